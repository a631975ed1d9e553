"""RGB foundation models that are plain ViTs: DINO-MC, Cross-Scale MAE, SatMAE.

All saw red, green and blue only, as 8-bit pictures. Networks of timm, checkpoints in
the authors' key layouts. Layer norms have eps 1e-6 in all.

Sources: DINO-MC, arXiv 2303.06670 and github.com/WennyXY/DINO-MC; Cross-Scale MAE,
NeurIPS 2023 and github.com/aicip/Cross-Scale-MAE; SatMAE, arXiv 2207.08051 and
github.com/sustainlab-group/SatMAE (both CC-BY-NC-4.0: facts only are taken).
Taught in notebook 05 (DEFLECT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.backbones.weights import State, load_strictly, strip_prefixes

RGB = ("RED", "GREEN", "BLUE")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PICTURES = (
    " Trained on 8-bit pictures: the statistics are those of display brightness, and "
    "reflectance is darker."
)
_PATCHES = (8, 16)


def build_dino_mc(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    patch: int = 8,
) -> ViTBackbone:
    """Build DINO-MC's ViT; of a full checkpoint the teacher is taken.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in the upstream's key layout, or None for random weights.
        patch: patch size in pixels. The authors' training script says 8, the table in
            their README 16; a file of the other size is refused and says which it is.

    Raises:
        ValueError: for another patch size, or a checkpoint that does not fit.
    """
    if patch not in _PATCHES:
        raise ValueError(f"patch={patch!r}: {card.name} takes 8 or 16")
    model = network(card, state, patch, card.image_size)
    if state is not None:
        kept = strip_prefixes(state, ("module.", "backbone."))
        kept = {key: t for key, t in kept.items() if not key.startswith("head.")}
        kernel = kept.get("patch_embed.proj.weight")
        if kernel is not None and kernel.shape[-1] != patch:
            raise ValueError(
                f"this checkpoint of {card.name} has patches of {kernel.shape[-1]} px "
                f"and patch={patch}. Load it with patch={kernel.shape[-1]}"
            )
        load_strictly(model, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


def build_mae(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> ViTBackbone:
    """Build a masked autoencoder's encoder with its fixed position table.

    `state` is in the upstream's or in MAE's key layout, or None for random weights. The
    position table of the file is used, whatever its grid.
    """
    kept = None if state is None else mae_state(state, card.name)
    side = card.image_size // card.patch
    table = fixed_table(card.width, side, side)  # (side*side, D)
    table = torch.cat([torch.zeros(1, card.width), table])[None]  # (1, 1 + N, D)
    if kept is not None:
        table = kept.pop("pos_embed", table).float()
        side = math.isqrt(table.shape[1] - 1)
    model = network(card, kept, card.patch, side * card.patch, pos_embed="none")
    if kept is not None:
        load_strictly(model, kept, card.name)
    # A buffer under timm's name: the plain model runs alone, and nothing trains it.
    del model.pos_embed
    model.register_buffer("pos_embed", table, persistent=False)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


def network(
    card: BackboneCard,
    state: Mapping[str, Tensor] | None,
    patch: int,
    image_size: int,
    kind: type[VisionTransformer] = VisionTransformer,
    epsilon: float = 1e-6,
    **options: Any,
) -> Any:
    """A ViT without a head, on the meta device where a checkpoint will fill it.

    `image_size` in pixels is that of the position table; `options` are those of `kind`.
    """

    def make() -> VisionTransformer:
        return kind(
            img_size=image_size,
            patch_size=patch,
            in_chans=len(card.bands),
            num_classes=0,
            embed_dim=card.width,
            depth=card.depth,
            num_heads=card.architecture["heads"],
            norm_layer=partial(nn.LayerNorm, eps=epsilon),
            dynamic_img_size=True,
            **options,
        )

    if state is None:
        return make()
    with torch.device("meta"):  # no memory and no time for random numbers
        return make()


def mae_state(state: Mapping[str, Tensor], name: str) -> State:
    """A masked autoencoder's keys in timm's names; decoder and predictor dropped.

    MAE's own names (SatMAE) are timm's. Cross-Scale MAE calls its blocks ``encoder.N``
    and two more tensors ``encoder_...``. Raises ValueError for an encoder of xformers.
    """
    if any("wrap_att" in key for key in state):
        raise ValueError(
            f"this checkpoint of {name} was trained with xformers' blocks, which "
            "normalise after each layer and are not those of timm. Take the file that "
            "the authors' README links"
        )
    dropped = ("decoder", "mask_token", "predictor.", "head.")
    kept = {}
    for key, tensor in strip_prefixes(state, ("module.",)).items():
        if key.startswith(dropped):
            continue
        if key.startswith("encoder."):
            key = key.replace("encoder.", "blocks.", 1)
        kept[key.removeprefix("encoder_")] = tensor
    return kept


def fixed_table(
    width: int,
    height: int,
    breadth: int,
    spacing: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """MAE's position table (height * breadth, D): half columns, half rows.

    Each half has all sines, then all cosines, base 10000. `spacing` is the distance of
    two patches in units of the code.
    """

    def code(count: int) -> Tensor:
        quarter = width // 4
        steps = torch.arange(quarter, dtype=torch.float64, device=device)
        places = torch.arange(count, dtype=torch.float64, device=device) * spacing
        angles = torch.outer(places, 10000 ** (-steps / quarter))
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (count, D/2)

    columns = code(breadth).expand(height, -1, -1)  # (h, w, D/2)
    rows = code(height)[:, None].expand(-1, breadth, -1)  # (h, w, D/2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


DINO_MC_SMALL = BackboneCard(
    name="dino_mc_small",
    family="dino_mc",
    bands=RGB,
    patch=8,
    width=384,
    depth=12,
    parameters=21_670_272,
    image_size=224,
    normalisation=Normalisation(1.0, *IMAGENET),
    licence_weights="MIT",
    licence_code="Apache-2.0",
    source="https://github.com/WennyXY/DINO-MC",
    architecture={"heads": 6},
    paper="arXiv 2303.06670",
    notes="ViT-S, self-distillation with crops of several sizes on Sentinel-2 RGB "
    "(SeCo-100K). patch=16 for files of that size." + PICTURES,
    cannot="Knows red, green and blue only. No published file was at hand: key names "
    "are those of the authors' code.",
    obtain="Open https://github.com/WennyXY/DINO-MC, follow the Google Drive link in "
    "the row 'DINO-MC, ViT-S' of the README, and download the checkpoint by hand",
)


def _cross_scale_card(
    name: str, width: int, depth: int, heads: int, parameters: int
) -> BackboneCard:
    return BackboneCard(
        name=f"cross_scale_mae_{name.lower()}",
        family="cross_scale_mae",
        bands=RGB,
        patch=16,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=128,
        normalisation=Normalisation(
            1.0,
            (0.43392888, 0.43578541, 0.40744025),
            (0.19828456, 0.19250111, 0.19454683),
        ),
        licence_weights="CC-BY-NC-4.0",
        licence_code="Apache-2.0",
        source="https://github.com/aicip/Cross-Scale-MAE",
        architecture={"heads": heads},
        paper="Tang et al. 2023, Cross-Scale MAE, NeurIPS",
        notes="Masked autoencoder on fMoW RGB that ties an image to a coarser view of "
        "it. 128 px is the authors' training default." + PICTURES,
        cannot="Knows red, green and blue only. No commercial use. No published file "
        "was at hand: key names are those of the authors' code, which throws away the "
        "result of the encoder's last norm while it trains.",
        obtain="Open https://github.com/aicip/Cross-Scale-MAE, follow the Google Drive "
        f"link in the row 'ViT-{name}' of the README, and download the file by hand",
    )


SATMAE_LARGE = BackboneCard(
    name="satmae_large",
    family="satmae",
    bands=RGB,
    patch=16,
    width=1024,
    depth=24,
    parameters=303_099_904,
    image_size=224,
    normalisation=Normalisation(
        1.0,
        (0.4182007312774658, 0.4214799106121063, 0.3991275727748871),
        (0.28774282336235046, 0.27541765570640564, 0.2764017581939697),
    ),
    licence_weights="CC-BY-NC-4.0",
    licence_code="Apache-2.0",
    source="https://github.com/sustainlab-group/SatMAE",
    weights={
        "default": WeightFile(
            "fmow_pretrain.pth",
            url="https://zenodo.org/record/7369797/files/fmow_pretrain.pth",
        )
    },
    architecture={"heads": 16},
    paper="arXiv 2207.08051",
    notes="ViT-L, masked autoencoder on fMoW RGB, 800 epochs; satmae_multispectral_* "
    "are its relatives for Sentinel-2." + PICTURES,
    cannot="Knows red, green and blue only. No commercial use. The published file was "
    "not at hand: key names are those of the authors' code.",
)

CARDS = (
    DINO_MC_SMALL,
    SATMAE_LARGE,
    _cross_scale_card("Base", 768, 12, 12, 85_647_360),
    _cross_scale_card("Large", 1024, 24, 16, 303_099_904),
)
