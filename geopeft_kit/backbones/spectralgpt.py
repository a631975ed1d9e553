"""SpectralGPT: a ViT whose patches are blocks of 8 x 8 pixels and three bands.

One 3-D kernel reads three neighbouring bands at a time, so twelve bands give four
tokens a patch. Two learned tables code the position and the three bands. A short module
on Galileo's blocks (separate q, k, v), written from the formulas.

Sources: Hong et al. 2024, SpectralGPT, arXiv 2311.07113; key names and sizes from
github.com/danfenghong/IEEE_TPAMI_SpectralGPT (GPL-3.0: facts only are taken).
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.galileo_network import Block
from geopeft_kit.backbones.grouped import GroupedViTBackbone, group_slots
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.rgb_vits import mae_state
from geopeft_kit.backbones.weights import State, filled

_TOGETHER = 3  # bands that one kernel reads
GROUPS = [tuple(range(first, first + _TOGETHER)) for first in range(0, 12, _TOGETHER)]


class CubeEmbedding(nn.Module):
    """Cubes of patch x patch pixels and three bands to tokens of width D."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        size = (_TOGETHER, patch, patch)
        self.proj = nn.Conv3d(1, width, size, size)

    def forward(self, volume: Tensor) -> Tensor:
        """(B, 3N, H, W) -> (B, h, w, N, D)."""
        return self.proj(volume[:, None]).permute(0, 3, 4, 2, 1)


class SpectralGPT(nn.Module):
    """The encoder; `side` is the number of patches along the position table's side."""

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, side: int
    ) -> None:
        super().__init__()
        self.patch_embed = CubeEmbedding(width, patch)
        self.pos_embed_spatial = nn.Parameter(torch.randn(1, side**2, width) * 0.02)
        self.pos_embed_temporal = nn.Parameter(
            torch.randn(1, len(GROUPS), width) * 0.02
        )
        self.blocks = nn.Sequential(
            *(Block(width, heads, eps=1e-6) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, 1e-6)


class SpectralGPTBackbone(GroupedViTBackbone):
    """SpectralGPT with the groups of three bands of which the image has one.

    A missing band of such a group is read as 0, which equals leaving its kernel out.
    Channels that share a kernel are added, for the same reason.
    """

    model: SpectralGPT
    slots: Tensor

    def __init__(self, card: BackboneCard, model: SpectralGPT, plan: BandPlan) -> None:
        super().__init__(card, model, plan, card.patch)
        found = group_slots(card, plan, GROUPS)
        self.rows = [number for number, pairs in enumerate(found) if pairs]
        slots = torch.zeros(len(self.rows), _TOGETHER, len(plan.read))
        for place, number in enumerate(self.rows):
            for channel, kernel in found[number]:
                slots[place, kernel, channel] = plan.share(plan.kernels[channel])
        self.register_buffer("slots", slots.flatten(0, 1), persistent=False)  # (3N, C)

    def embed(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Normalised image (B, C, H, W) -> tokens with positions (B, h, w, N, D)."""
        volume = torch.einsum("sc,bchw->bshw", self.slots.to(image.dtype), image)
        patches = self.model.patch_embed(volume)  # (B, h, w, N, D)
        height, breadth = patches.shape[1:3]
        place = resample_abs_pos_embed(
            self.model.pos_embed_spatial, [height, breadth], num_prefix_tokens=0
        )  # (1, h*w, D)
        place = place.unflatten(1, (height, breadth))  # (1, h, w, D)
        group = self.model.pos_embed_temporal[0, self.rows]  # (N, D)
        return patches + place[:, :, :, None] + group


@register("spectralgpt")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
) -> SpectralGPTBackbone:
    """Build SpectralGPT's encoder; the file's position table may have another grid."""
    side = card.image_size // card.patch
    kept = None if state is None else mae_state(state, card.name)
    if kept is not None and "pos_embed_spatial" in kept:
        side = round(kept["pos_embed_spatial"].shape[1] ** 0.5)
    sizes = card.width, card.depth, card.architecture["heads"], card.patch, side
    model = filled(lambda: SpectralGPT(*sizes), kept, card.name)
    return SpectralGPTBackbone(card, model, plan)
