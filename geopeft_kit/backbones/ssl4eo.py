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

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, WeightFile
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
) -> ViTBackbone:
    """Build a ViT.

    `state` is in timm's key layout, as in torchgeo's files, or from MoCo's or DINO's
    training; None gives random weights. A file without the last norm, which torchgeo
    accepts, gets gain 1 and shift 0.
    """
    scale = 1e-5 if card.architecture["layer_scale"] else None
    model = network(card, state, card.patch, card.image_size, init_values=scale)
    if state is not None:
        kept = encoder_state(state, "head.")
        kept.setdefault("norm.weight", torch.ones(card.width))
        kept.setdefault("norm.bias", torch.zeros(card.width))
        load_strictly(model, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


def build_resnet(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> HierarchicalBackbone:
    """Build a ResNet-50; `state` is as for `build_vit`."""

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
    return HierarchicalBackbone(card, model, plan, "resnet")


def encoder_state(state: Mapping[str, Tensor], classifier: str) -> State:
    """The network alone in timm's names, from torchgeo's file or a training checkpoint.

    Keys that start with `classifier` are dropped.
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
_ENUMS = {  # of torchgeo
    ("SSL4EO", "vit_small"): "ViTSmall16_Weights",
    ("SSL4EO", "vit_base"): "ViTBase16_Weights",
    ("SSL4EO", "resnet50"): "ResNet50_Weights",
    ("DeCUR", "resnet50"): "ResNet50_Weights",
    ("SoftCon", "vit_small"): "ViTSmall14_DINOv2_Weights",
    ("SoftCon", "vit_base"): "ViTBase14_DINOv2_Weights",
    ("SoftCon", "resnet50"): "ResNet50_Weights",
}
# method, network, radar, parameters, tags: the first is the default
_PUBLISHED: tuple[tuple[str, str, bool, int, tuple[str, ...]], ...] = (
    ("SSL4EO", "vit_small", False, 22_648_704, ("dino", "moco", "mae", "fgmae")),
    ("SSL4EO", "vit_small", True, 21_567_360, ("mae", "fgmae")),
    ("SSL4EO", "vit_base", False, 87_764_736, ("mae", "fgmae")),
    ("SSL4EO", "vit_base", True, 85_602_048, ("mae", "fgmae")),
    ("SSL4EO", "resnet50", False, 23_539_392, ("moco", "dino")),
    ("SSL4EO", "resnet50", True, 23_504_896, ("moco",)),
    ("DeCUR", "resnet50", False, 23_539_392, ("decur",)),
    ("DeCUR", "resnet50", True, 23_504_896, ("decur",)),
    ("SoftCon", "vit_small", False, 22_381_440, ("softcon",)),
    ("SoftCon", "vit_small", True, 21_553_536, ("softcon",)),
    ("SoftCon", "vit_base", False, 87_230_208, ("softcon",)),
    ("SoftCon", "vit_base", True, 85_574_400, ("softcon",)),
    ("SoftCon", "resnet50", False, 23_539_392, ("softcon",)),
    ("SoftCon", "resnet50", True, 23_504_896, ("softcon",)),
)


def _card(
    method: str,
    kind: str,
    radar: bool,
    parameters: int,
    tags: tuple[str, ...],
) -> BackboneCard:
    sizes, resnet = _SIZES[kind], kind == "resnet50"
    paper, source = _PAPERS[method]
    statistics = S2_STATISTICS if method == "SoftCon" else S2_TEN_THOUSAND
    sensor = "SENTINEL1_GRD" if radar else "SENTINEL2_ALL"
    weights = {
        tag: WeightFile(torchgeo=f"{_ENUMS[method, kind]}.{sensor}_{tag.upper()}")
        for tag in tags
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
