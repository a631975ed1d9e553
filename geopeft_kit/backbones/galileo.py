"""Galileo: a small ViT over groups of bands, with real public weights.

Galileo makes one token per patch *and channel group*: BLUE, GREEN, RED are one group,
the SWIR bands another. Groups that an image lacks are left out of the sequence. The
patch size is 1 to 8 pixels: the 8 x 8 kernels are resized so that a patch and its
resized copy give the same token. The network is in `galileo_network.py`.

Source: Tseng et al., Galileo, arXiv 2502.09356 and github.com/nasaharvest/galileo.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.galileo_network import (
    GROUPS,
    MAX_PATCH,
    Galileo,
    kernel_resize,
)
from geopeft_kit.backbones.grouped import GroupedViTBackbone
from geopeft_kit.backbones.metadata import ground_size
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.weights import State, filled

# First day of each month, counted from 0, in a year of 365 days.
_MONTH_STARTS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
# Groups of other sensors, in the file and not used here.
_OTHER = (
    "space_embed.",
    "time_embed.",
    "static_embed.",
    "sp_channel_embed",
    "t_channel_embed",
    "st_channel_embed",
)


class GalileoBackbone(GroupedViTBackbone):
    """Galileo with the channel groups that the image covers.

    `patch` is in pixels, `month` (from 0) is for images without a date, `resolution` is
    the ground size of a pixel in metres.
    """

    model: Galileo
    resize: Tensor | None

    def __init__(
        self,
        card: BackboneCard,
        model: Galileo,
        plan: BandPlan,
        patch: int,
        month: int,
        resolution: float,
    ) -> None:
        super().__init__(card, model, plan, patch)
        self.patch, self.month, self.resolution = patch, month, resolution
        names = [plan.bands[position] for position in plan.read]
        self.positions = {
            group: [names.index(band) for band in GROUPS[group]]
            for group in model.space_time_embed
        }
        matrix = None if patch == MAX_PATCH else kernel_resize(MAX_PATCH, patch)
        self.register_buffer("resize", matrix, persistent=False)

    def embed(self, image: Tensor, meta: Meta | None) -> Tensor:
        """Normalised image (B, C, H, W) -> tokens with encodings (B, h, w, N, D)."""
        patches = torch.stack(
            [
                embed(image[:, self.positions[group]], self.resize)
                for group, embed in self.model.space_time_embed.items()
            ],
            dim=3,
        )  # (B, h, w, N, D)
        step = self.patch * self.resolution / 10
        added = self.model.encodings(
            patches.shape[1], patches.shape[2], self._months(meta, image), step
        )
        return patches + added.to(patches.dtype)

    def _months(self, meta: Meta | None, image: Tensor) -> Tensor:
        """(B,) months from 0: of ``meta["date"]`` where it is given, else `month`."""
        if not meta or meta.get("date") is None:
            return torch.full((image.shape[0],), self.month, device=image.device)
        date = meta["date"].to(image.device)[:, 0]  # (B, 2)
        return month_of(date[:, 0], date[:, 1])


def month_of(year: Tensor, day: Tensor) -> Tensor:
    """Month 0 to 11 of a year and a day of the year counted from 0, all (B,)."""
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    day = torch.where(leap & (day >= 59), day - 1, day)  # 29 February is day 59
    starts = torch.tensor(_MONTH_STARTS[1:], device=day.device, dtype=day.dtype)
    return torch.bucketize(day.contiguous(), starts, right=True)


@register("galileo")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    patch: int = MAX_PATCH,
    month: int = 6,
    resolution: float = 10.0,
) -> GalileoBackbone:
    """Build Galileo for the channel groups that the image covers.

    Args:
        card, plan, state: as for every builder.
        patch: patch size in pixels, 1 to 8; 4 makes four times the tokens of 8.
        month: month from 0, for images that come without a date (6 is July).
        resolution: ground size of a pixel in metres.
    """
    if patch not in range(1, MAX_PATCH + 1):
        raise ValueError(f"patch={patch!r}: {card.name} takes 1 to {MAX_PATCH}")
    if month not in range(12):
        raise ValueError(f"month={month!r}: 0 (January) to 11 (December) are allowed")
    groups, plan = _cover(card, plan)
    sizes = card.width, card.depth, card.architecture["heads"]
    kept = None if state is None else _known(state, groups)
    model = filled(lambda: Galileo(*sizes, groups, patch), kept, card.name)
    size = ground_size(resolution)
    return GalileoBackbone(card, model, plan, patch, month, size)


def _cover(card: BackboneCard, plan: BandPlan) -> tuple[list[str], BandPlan]:
    """Groups that the bands cover whole, and the plan without the other bands."""
    if any(band not in card.bands for band in plan.read_bands):
        raise ValueError(
            f"{card.name} reads its bands in groups, so a new one has no kernel to "
            "copy or draw: use new_bands='ignore', or leave it out"
        )
    groups, partly = [], []
    for group, members in GROUPS.items():
        missing = [band for band in members if band not in plan.read_bands]
        if not missing:
            groups.append(group)
        elif len(missing) < len(members):
            partly.append(f"{group} lacks {', '.join(missing)}")
    if partly and plan.new_bands != "ignore":
        raise ValueError(
            f"{card.name} reads bands in whole groups: {'; '.join(partly)}. Give all "
            "bands of a group or none, or new_bands='ignore' to leave it unread"
        )
    if not groups:
        raise ValueError(
            f"no channel group of {card.name} is whole: {'; '.join(partly)}. Add bands"
        )
    whole = {band for group in groups for band in GROUPS[group]}
    kept = [position for position in plan.read if plan.bands[position] in whole]
    kernels = tuple(card.bands.index(plan.bands[position]) for position in kept)
    return groups, replace(plan, read=tuple(kept), kernels=kernels)


def _known(state: State, groups: Sequence[str]) -> State:
    """The checkpoint without the channel groups and sensors that are not used."""
    unused = tuple(f"space_time_embed.{g}." for g in GROUPS if g not in groups)
    return {k: v for k, v in state.items() if not k.startswith(_OTHER + unused)}
