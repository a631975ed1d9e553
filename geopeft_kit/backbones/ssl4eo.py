"""SSL4EO-S12's plain networks: ViTs and ResNet-50 by DINO, MoCo, MAE, DeCUR, SoftCon.

One data set, several ways of learning without labels, hence one card with several tags
where network and pixel values agree. DeCUR and SoftCon have cards of their own: SoftCon
takes band statistics, and its ViTs have patches of 14 px and layer scale. Sentinel-1 is
a card of its own too (``_s1``).

The networks are timm's, as in torchgeo.

Sources: SSL4EO-S12, arXiv 2211.07044; FG-MAE, arXiv 2310.18653; DeCUR, arXiv
2309.05300; SoftCon, arXiv 2405.20462; torchgeo (MIT).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, BandPlan, WeightFile
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.rgb_vits import network
from geopeft_kit.backbones.torchgeo_facts import (
    DECIBEL,
    LICENCE,
    S1_STATISTICS,
    S2_STATISTICS,
    S2_TEN_THOUSAND,
    SENTINEL1,
    SENTINEL2,
)
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.backbones.weights import State, load_strictly, strip_prefixes

# The trained network in whole training checkpoints: MoCo v3, MoCo v2, DINO.
_NETWORKS = ("base_encoder.", "encoder_q.", "backbone.")
# What such a checkpoint has besides: the slow twin, predictors, queues.
_BESIDES = ("momentum_encoder.", "encoder_k.", "predictor.", "queue")


def build_vit(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    image_size: int | None = None,
    normalise: bool = True,
) -> ViTBackbone:
    """Build a ViT.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in timm's key layout, as torchgeo's files have it, or one of
            MoCo's or DINO's training; None for random weights. A file without the last
            norm, which torchgeo tolerates, gets gain 1 and shift 0.
        image_size: not needed: the table is resized to each image, as timm does.
        normalise: see `load_backbone`.

    Raises:
        ValueError: for a checkpoint that does not fit.
    """
    scale = 1e-5 if card.architecture["layer_scale"] else None
    model = network(card, state, card.patch, card.image_size, init_values=scale)
    if state is not None:
        kept = encoder_state(state, "head.")
        kept.setdefault("norm.weight", torch.ones(card.width))
        kept.setdefault("norm.bias", torch.zeros(card.width))
        load_strictly(model, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan, normalise)


def build_resnet(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    image_size: int | None = None,
    normalise: bool = True,
) -> HierarchicalBackbone:
    """Build a ResNet-50.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in timm's key layout, as torchgeo's files have it, or one of
            MoCo's or DINO's training; None for random weights.
        image_size: not needed: any multiple of 32.
        normalise: see `load_backbone`.

    Raises:
        ValueError: for a checkpoint that does not fit.
    """

    def make() -> Any:
        return timm.create_model(
            "resnet50", pretrained=False, num_classes=0, in_chans=len(card.bands)
        )

    if state is None:
        model = make()
    else:
        with torch.device("meta"):  # no memory and no time for random numbers
            model = make()
        load_strictly(model, encoder_state(state, "fc."), card.name)
    adapt_kernels(model.conv1, plan)
    return HierarchicalBackbone(card, model, plan, normalise, "resnet")


def encoder_state(state: Mapping[str, Tensor], classifier: str) -> State:
    """The network alone, under timm's names.

    Args:
        state: torchgeo's file, which is that already, or a training checkpoint.
        classifier: beginning of the classifier's keys, which are dropped.
    """
    kept = {
        key: tensor
        for key, tensor in strip_prefixes(state, ("module.",)).items()
        if not key.startswith(_BESIDES)
    }
    inner = next((p for p in _NETWORKS if any(k.startswith(p) for k in kept)), "")
    return {
        key.removeprefix(inner): tensor
        for key, tensor in kept.items()
        if not key.removeprefix(inner).startswith(classifier)
        and not (inner and key.startswith(classifier))
    }


_PAPERS = {
    "SSL4EO": ("arXiv 2211.07044", "https://github.com/zhu-xlab/SSL4EO-S12"),
    "DeCUR": ("arXiv 2309.05300", "https://github.com/zhu-xlab/DeCUR"),
    "SoftCon": ("arXiv 2405.20462", "https://github.com/zhu-xlab/softcon"),
}
_SIZES: dict[str, dict[str, Any]] = {
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "resnet50": {"width": 2048, "depth": 16},
}
# Repositories on the Hugging Face hub: owner/name and revision.
_MAE = ("wangyi111/SSL4EO-S12", "75c72195d35201dc1fb210818993518c25da566b")
_FGMAE = ("wangyi111/FGMAE", "24dd3077d7a99ecd454eaec7adb83d045d7fa122")
_SOFT_VIT = ("wangyi111/softcon", "bae909781911f8ec034b4b959992fae17b973c0c")
_SOFT_RESNET = ("wangyi111/softcon", "62ff465b2e7467dbfc70758ec1e9d08ab87fc46b")


def _own(stem: str, revision: str, prefix: str) -> tuple[str, str, str]:
    """A file whose repository in torchgeo's organisation has its name."""
    return f"torchgeo/{stem}", revision, f"{stem}-{prefix}.pth"


_VIT = "vit_small_patch16_224_sentinel2_all"
_RESNET = "resnet50_sentinel"
# method, network, radar, parameters, {tag: (repository, revision, file)}
_PUBLISHED: tuple[
    tuple[str, str, bool, int, dict[str, tuple[str, str, str]]], ...
] = (
    ("SSL4EO", "vit_small", False, 22_648_704, {
        "dino": _own(f"{_VIT}_dino", "5b41dd418a79de47ac9f5be3e035405a83818a62",
                     "36bcc127"),
        "moco": _own(f"{_VIT}_moco", "1cb683f6c14739634cdfaaceb076529adf898c74",
                     "67c9032d"),
        "mae": (*_MAE, "B13_vits16_mae_ep99_enc.pth"),
        "fgmae": (*_FGMAE, "B13_vits16_fgmae_ep99_enc.pth"),
    }),
    ("SSL4EO", "vit_small", True, 21_567_360, {
        "mae": (*_MAE, "B2_vits16_mae_ep99_enc.pth"),
        "fgmae": (*_FGMAE, "B2_vits16_fgmae_ep99_enc.pth"),
    }),
    ("SSL4EO", "vit_base", False, 87_764_736, {
        "mae": (*_MAE, "B13_vitb16_mae_ep99_enc.pth"),
        "fgmae": (*_FGMAE, "B13_vitb16_fgmae_ep99_enc.pth"),
    }),
    ("SSL4EO", "vit_base", True, 85_602_048, {
        "mae": (*_MAE, "B2_vitb16_mae_ep99_enc.pth"),
        "fgmae": (*_FGMAE, "B2_vitb16_fgmae_ep99_enc.pth"),
    }),
    ("SSL4EO", "resnet50", False, 23_539_392, {
        "moco": _own(f"{_RESNET}2_all_moco",
                     "da4f3c9dbe09272eb902f3b37f46635fa4726879", "df8b932e"),
        "dino": _own(f"{_RESNET}2_all_dino",
                     "d7f14bf5530d70ac69d763e58e77e44dbecfec7c", "d6c330e9"),
    }),
    ("SSL4EO", "resnet50", True, 23_504_896, {
        "moco": _own(f"{_RESNET}1_all_moco",
                     "e79862c667853c10a709bdd77ea8ffbad0e0f1cf", "906e4356"),
    }),
    ("DeCUR", "resnet50", False, 23_539_392, {
        "decur": ("torchgeo/decur", "eba7ae5945d482a4319be046d34b552db5dd9950",
                  "rn50_ssl4eo-s12_ms_decur_ep100-fc6b09ff.pth"),
    }),
    ("DeCUR", "resnet50", True, 23_504_896, {
        "decur": ("torchgeo/decur", "9328eeb90c686a88b30f8526ed757b4bc0f12027",
                  "rn50_ssl4eo-s12_sar_decur_ep100-f0e69ba2.pth"),
    }),
    ("SoftCon", "vit_small", False, 22_381_440,
     {"softcon": (*_SOFT_VIT, "B13_vits14_softcon_enc.pth")}),
    ("SoftCon", "vit_small", True, 21_553_536,
     {"softcon": (*_SOFT_VIT, "B2_vits14_softcon_enc.pth")}),
    ("SoftCon", "vit_base", False, 87_230_208,
     {"softcon": (*_SOFT_VIT, "B13_vitb14_softcon_enc.pth")}),
    ("SoftCon", "vit_base", True, 85_574_400,
     {"softcon": (*_SOFT_VIT, "B2_vitb14_softcon_enc.pth")}),
    ("SoftCon", "resnet50", False, 23_539_392,
     {"softcon": (*_SOFT_RESNET, "B13_rn50_softcon.pth")}),
    ("SoftCon", "resnet50", True, 23_504_896,
     {"softcon": (*_SOFT_RESNET, "B2_rn50_softcon.pth")}),
)  # fmt: skip


def _card(
    method: str,
    kind: str,
    radar: bool,
    parameters: int,
    files: Mapping[str, tuple[str, str, str]],
) -> BackboneCard:
    sizes, resnet = _SIZES[kind], kind == "resnet50"
    paper, source = _PAPERS[method]
    statistics = S2_STATISTICS if method == "SoftCon" else S2_TEN_THOUSAND
    weights = {
        tag: WeightFile(file, repo=repo, revision=revision)
        for tag, (repo, revision, file) in files.items()
    }
    patches = 14 if method == "SoftCon" else 16
    return BackboneCard(
        name=f"{method.lower()}_{kind}{'_s1' if radar else ''}",
        family="ssl4eo_resnet" if resnet else "ssl4eo_vit",
        bands=SENTINEL1 if radar else SENTINEL2,
        patch=4 if resnet else patches,
        width=sizes["width"],
        depth=sizes["depth"],
        parameters=parameters,
        image_size=224,
        normalisation=S1_STATISTICS if radar else statistics,
        licence_weights=LICENCE,
        licence_code="Apache-2.0",
        source=source,
        weights={"default": next(iter(weights.values())), **weights},
        architecture={**sizes, "layer_scale": method == "SoftCon"},
        paper=paper,
        notes=f"{method} on SSL4EO-S12, {'Sentinel-1' if radar else 'Sentinel-2 L1C'}; "
        f"tags: {', '.join(weights)}." + (DECIBEL if radar else ""),
        cannot=_cannot(method, resnet),
    )


def _cannot(method: str, resnet: bool) -> str:
    text = "The published files were not at hand: key names are those of timm's class."
    if method == "SSL4EO":
        text += " SoftCon and DeCUR have cards of their own."
    if method == "SoftCon" and not resnet:
        text += " Patches of 14 px: image sides are multiples of 14."
    return text


CARDS = tuple(_card(*row) for row in _PUBLISHED)
