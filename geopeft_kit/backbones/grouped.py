"""ViTs that make several tokens of a patch: one for each group of bands.

Galileo, SatMAE's multispectral models and SpectralGPT share everything after their
patch embeddings: the tokens of all groups are one sequence, and the maps are the mean
over the groups of a patch. Groups of which the image has no band are left out.

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta, tap_points, tapped_tokens
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.vit import prepended


class GroupedViTBackbone(Backbone):
    """Four maps at patch stride: the mean over the groups of each patch.

    The sequence is prefix, then row, column, group. Attention does not depend on the
    order of its tokens, so this equals upstreams that put the groups first.
    """

    layout = "vit"
    model: Any

    def __init__(
        self,
        card: BackboneCard,
        model: Any,
        plan: BandPlan,
        patch: int,
    ) -> None:
        super().__init__(card, model, plan)
        self.width = card.width
        self.channels = [card.width] * 4
        self.strides = [patch] * 4
        self.taps = tap_points(len(model.blocks))

    def embed(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Normalised image (B, C, H, W) -> tokens with positions (B, h, w, N, D)."""
        raise NotImplementedError

    def prefix(self) -> Tensor | None:
        """Tokens before the patch tokens, (1, P, D); here none."""
        return None

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, D, h, w)."""
        tokens = self.embed(image, meta)  # (B, h, w, N, D)
        grid = tokens.shape[1:4]
        self.grid.height, self.grid.width, self.grid.groups = grid
        tokens = tokens.flatten(1, 3)  # (B, h*w*N, D)
        first = self.prefix()
        if first is not None:
            tokens = prepended(first, tokens)  # (B, P + h*w*N, D)
        maps = []
        for tapped in tapped_tokens(self.model, tokens, self.taps):
            own = tapped[:, -grid.numel() :].unflatten(1, grid)  # (B, h, w, N, D)
            maps.append(own.mean(dim=3).permute(0, 3, 1, 2))  # (B, D, h, w)
        return maps


def group_slots(
    card: BackboneCard, plan: BandPlan, groups: list[tuple[int, ...]]
) -> list[list[tuple[int, int]]]:
    """For each group, its pairs (channel among those read, kernel of the group).

    `groups` holds indices of the card's bands. A missing band leaves its kernel out;
    under a nearest policy two channels may share one. Raises ValueError for a random
    kernel, which belongs to no group.
    """
    if None in plan.kernels:
        raise ValueError(
            f"{card.name} reads its bands in groups, and a new band with a random "
            "kernel belongs to none: use new_bands='share_nearest', 'copy_nearest' or "
            "'ignore', or leave it out"
        )
    return [
        [
            (channel, group.index(kernel))
            for channel, kernel in enumerate(plan.kernels)
            if kernel in group
        ]
        for group in groups
    ]
