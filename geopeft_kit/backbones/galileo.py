"""Galileo: a small ViT over groups of bands, with real public weights.

Galileo makes one token per patch *and channel group*: BLUE, GREEN, RED are one group,
the SWIR bands another. Groups that an image lacks are simply not in the sequence. The
patch size is free from 1 to 8: the 8 x 8 kernels are resized so that a patch and its
resized copy give the same token.

`galileo_network.py` holds the network.

Source: Tseng et al., Galileo, arXiv 2502.09356 and github.com/nasaharvest/galileo.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.galileo_network import (
    GROUPS,
    MAX_PATCH,
    Galileo,
    kernel_resize,
)
from geopeft_kit.backbones.grouped import GroupedViTBackbone
from geopeft_kit.backbones.weights import State, load_strictly

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
            return torch.full((len(image),), self.month, device=image.device)
        date = meta["date"].to(image.device)[:, 0]  # (B, 2)
        return month_of(date[:, 0], date[:, 1])


def month_of(year: Tensor, day: Tensor) -> Tensor:
    """Month 0 to 11 of a year and a day of the year counted from 0, all (B,)."""
    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    day = torch.where(leap & (day >= 59), day - 1, day)  # 29 February is day 59
    starts = torch.tensor(_MONTH_STARTS[1:], device=day.device, dtype=day.dtype)
    return torch.bucketize(day.contiguous(), starts, right=True)


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    patch: int = MAX_PATCH,
    month: int = 6,
    resolution: float = 10.0,
) -> GalileoBackbone:
    """Build Galileo for the channel groups that the image covers.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in the upstream's key layout, or None for random weights.
        patch: patch size in pixels, 1 to 8; 4 makes four times the tokens of 8.
        month: month from 0, for images that come without a date (6 is July).
        resolution: ground size of a pixel in metres.

    Raises:
        ValueError: for an option out of range or a band set that covers a channel
            group only partly.
    """
    if patch not in range(1, MAX_PATCH + 1):
        raise ValueError(f"patch={patch!r}: {card.name} takes 1 to {MAX_PATCH}")
    if month not in range(12):
        raise ValueError(f"month={month!r}: 0 (January) to 11 (December) are allowed")
    if not resolution > 0:
        raise ValueError(f"resolution={resolution!r}: metres per pixel, above 0")
    groups, plan = _cover(card, plan)
    heads = int(str(card.architecture["heads"]))
    model = Galileo(card.width, card.depth, heads, groups, patch)
    if state is not None:
        load_strictly(model, _known(state, groups), card.name)
    return GalileoBackbone(card, model, plan, patch, month, resolution)


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


def _known(state: Mapping[str, Tensor], groups: Sequence[str]) -> State:
    """The checkpoint without the channel groups and sensors that are not at hand."""
    unused = tuple(f"space_time_embed.{g}." for g in GROUPS if g not in groups)
    return {k: v for k, v in state.items() if not k.startswith(_OTHER + unused)}


# Order of the authors' normalisation file; surface reflectance x 10000.
_STATISTICS = (  # band, mean, standard deviation
    ("BLUE", 1395.3409, 917.7041),
    ("GREEN", 1338.4027, 913.2988),
    ("RED", 1343.0988, 1092.6787),
    ("RED_EDGE_1", 1543.8608, 1047.2206),
    ("RED_EDGE_2", 2186.2022, 1048.0102),
    ("RED_EDGE_3", 2525.0933, 1143.6903),
    ("NIR_BROAD", 2410.3377, 1098.9792),
    ("NIR_NARROW", 2750.2855, 1204.4728),
    ("SWIR_1", 2234.9111, 1145.9774),
    ("SWIR_2", 1474.5311, 980.2430),
)
_COMMIT = "0f0b5b95ac81acef4b74cf4686dc877202f4541b"


def _card(
    size: str,
    width: int,
    depth: int,
    heads: int,
    parameters: int,
    weights: WeightFile,
    notes: str = "",
) -> BackboneCard:
    return BackboneCard(
        name=f"galileo_{size}",
        family="galileo",
        bands=tuple(band for band, _, _ in _STATISTICS),
        patch=MAX_PATCH,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=64,
        # The authors map mean - 2 std to 0 and mean + 2 std to 1.
        normalisation=Normalisation(
            1e4,
            tuple(mean - 2 * std for _, mean, std in _STATISTICS),
            tuple(4 * std for _, _, std in _STATISTICS),
        ),
        licence_weights="MIT",
        licence_code="Apache-2.0",
        source="https://github.com/nasaharvest/galileo",
        weights={"default": weights},
        architecture={"heads": heads},
        paper="arXiv 2502.09356",
        notes="Self-supervised on Sentinel-1, Sentinel-2, weather, elevation and more. "
        "One token per patch and channel group; the month of meta['date'] is used, "
        "else July." + notes,
        cannot="Reads one date of Sentinel-2; radar, NDVI, weather and the other "
        "inputs are in the file and are not used.",
    )


_HUB = "nasaharvest/galileo"
_NOT_OPENED = (
    " Sizes are those of the authors' configuration; this file was not at hand, and "
    "its key names are those of the nano file."
)

CARDS = (
    _card(
        "nano",
        128,
        4,
        8,
        876_128,
        WeightFile(
            "encoder.pt",
            revision=_COMMIT,
            url=f"https://raw.githubusercontent.com/nasaharvest/galileo/{_COMMIT}"
            "/data/models/nano/encoder.pt",
            sha256="eab6acacf527886a508a555bc24efe4b4a2cf91b162e84cd1c4a1807e942180c",
        ),
        " The file holds 1,037,856 numbers.",
    ),
    _card(
        "tiny",
        192,
        12,
        3,
        5_462_928,
        WeightFile("models/tiny/encoder.pt", _HUB),
        _NOT_OPENED,
    ),
    _card(
        "base",
        768,
        12,
        12,
        85_552_704,
        WeightFile("models/base/encoder.pt", _HUB),
        _NOT_OPENED,
    ),
)
