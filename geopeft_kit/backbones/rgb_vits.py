"""RGB foundation models that are plain ViTs: DINO-MC and three masked autoencoders.

All saw red, green and blue only, as 8-bit pictures. Networks of timm (Scale-MAE: of
torchgeo), checkpoints in the authors' key layouts. Layer norms have eps 1e-6 in all.

Sources: DINO-MC, arXiv 2303.06670 and github.com/WennyXY/DINO-MC; Cross-Scale MAE,
NeurIPS 2023 and github.com/aicip/Cross-Scale-MAE; SatMAE, arXiv 2207.08051 and
github.com/sustainlab-group/SatMAE (both CC-BY-NC-4.0: facts only are taken); Scale-MAE,
arXiv 2212.14532 and torchgeo (MIT).
Taught in notebook 05 (DEFLECT).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.metadata import ground_size
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.vit import (
    ViTBackbone,
    fix_positions,
    fixed_table,
    prepended,
    vit_network,
    with_class_row,
)
from geopeft_kit.backbones.weights import (
    State,
    check_patch,
    filled,
    strip_prefixes,
)

_PATCHES = (8, 16)
# Scale-MAE's tensors outside the encoder, and the table that is computed.
_NOT_SCALEMAE = (
    "decoder",
    "mask_token",
    "pos_embed",
    "pos_emb_projection.",
    "fpn.",
    "fcn_",
    "head.",
)


@register("dino_mc")
def build_dino_mc(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    patch: int = 8,
) -> ViTBackbone:
    """Build DINO-MC's ViT; of a full checkpoint the teacher is taken.

    Args:
        card, plan, state: as for every builder.
        patch: patch size in pixels. The authors' training script says 8, the table in
            their README 16; a file of the other size is refused and says which it is.
    """
    if patch not in _PATCHES:
        raise ValueError(f"patch={patch!r}: {card.name} takes 8 or 16")
    kept = None
    if state is not None:
        kept = strip_prefixes(state, ("module.", "backbone."))
        kept = {key: t for key, t in kept.items() if not key.startswith("head.")}
        check_patch(card.name, kept.get("patch_embed.proj.weight"), patch)
    model = filled(lambda: vit_network(card, patch_size=patch), kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


@register("satmae")
@register("cross_scale_mae")
def build_mae(card: BackboneCard, plan: BandPlan, state: State | None) -> ViTBackbone:
    """Build a masked autoencoder's encoder from the upstream's or MAE's keys.

    The position table of the file is used, whatever its grid.
    """
    kept = None if state is None else mae_state(state, card.name)
    side = card.image_size // card.patch
    table = with_class_row(fixed_table(card.width, side, side))  # (1, 1 + N, D)
    if kept is not None:
        table = kept.pop("pos_embed", table).float()
        side = math.isqrt(table.shape[1] - 1)
    size = side * card.patch
    model = filled(
        lambda: vit_network(card, img_size=size, pos_embed="none"), kept, card.name
    )
    fix_positions(model, table)
    adapt_kernels(model.patch_embed.proj, plan)
    return ViTBackbone(card, model, plan)


def mae_state(state: State, name: str) -> State:
    """A masked autoencoder's keys in timm's names; decoder and predictor dropped.

    MAE's own names (SatMAE) are timm's. Cross-Scale MAE calls its blocks ``encoder.N``
    and two more tensors ``encoder_...``. Raises ValueError for an encoder of xformers.
    """
    if any("wrap_att" in key for key in state):
        raise ValueError(
            f"this checkpoint of {name} was trained with xformers' blocks, which "
            "normalise after each layer and differ from timm's. Take the file that "
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


class ScaleMAEBackbone(ViTBackbone):
    """Scale-MAE: positions are in metres on the ground, not in patches.

    Attributes:
        resolution: ground size of a pixel in metres; may be changed at any time.
    """

    model: Any
    resolution: float

    def add_positions(self, patches: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, 1 + h*w, D); computed for the grid of each image."""
        height, breadth, width = patches.shape[1:]
        table = fixed_table(width, height, breadth, self.resolution, patches.device)
        tokens = patches.flatten(1, 2) + table.to(patches.dtype)  # (B, h*w, D)
        return prepended(self.model.cls_token, tokens)


@register("scalemae")
def build_scalemae(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    resolution: float = 1.0,
) -> ScaleMAEBackbone:
    """Build Scale-MAE's encoder from torchgeo's or the authors' keys.

    Args:
        card, plan, state: as for every builder.
        resolution: ground size of a pixel in metres; 1 is torchgeo's default, and
            Sentinel-2 has 10. A user separated EuroSAT better with 1 than with 10
            (issue 1 of bair-climate-initiative/scale-mae), so try both.
    """
    from torchgeo.models.scale_mae import ScaleMAE

    resolution = ground_size(resolution)
    kept = None
    if state is not None:
        kept = strip_prefixes(state, ("module.",))
        kept = {key: t for key, t in kept.items() if not key.startswith(_NOT_SCALEMAE)}

    def make() -> ScaleMAE:
        model = vit_network(card, ScaleMAE, res=resolution)
        # torchgeo keeps a table that its own forward never reads.
        model.register_parameter("pos_embed", None)
        return model

    model = filled(make, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    backbone = ScaleMAEBackbone(card, model, plan)
    backbone.resolution = resolution
    return backbone
