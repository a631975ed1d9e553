"""Copernicus-FM: kernels from wavelengths and bandwidths; place and date as codes.

Source: Wang et al. 2025, Copernicus-FM, arXiv 2503.11849; torchgeo (MIT); radar's
numbers from the configurations of the authors' Copernicus-Bench.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Meta
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.metadata import ground_size
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.spectral import (
    MICRO_TO_NANO,
    SpectralPatches,
    described,
    spectral_network,
)
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.backbones.weights import State
from geopeft_kit.bands import BANDS, wavelengths

# 5 cm, and a bandwidth of 1 m, in nanometres.
_RADAR_WAVELENGTHS = {"VV": 5e7, "VH": 5e7}
_RADAR_BANDWIDTHS = {"VV": 1e9, "VH": 1e9}
_PATCHES = range(3, 65)
_EPOCH = 719_163  # ordinal day of 1970-01-01


class CopernicusPatches(SpectralPatches):
    """Kernels from `wavelengths` and `bandwidths` in nanometres, of any size."""

    wavelengths: Sequence[float]
    bandwidths: Sequence[float]

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D)."""
        waves, widths = (
            torch.tensor(values, device=image.device)
            for values in (self.wavelengths, self.bandwidths)
        )  # (C,) each
        return self.embed(image, waves, widths, kernel_size=self.patch_size[0])


class CopernicusViT(VisionTransformer):
    """timm's ViT with Copernicus-FM's layers for place, time and area."""

    def __init__(self, **options: Any) -> None:
        from torchgeo.models.copernicusfm import FourierExpansion

        super().__init__(**options)
        self.coord_expansion = FourierExpansion(0.0001, 720)
        self.scale_expansion = FourierExpansion(0.001, 5.1e8)
        self.time_expansion = FourierExpansion(1, 365.25, assert_range=False)
        for name in ("coord", "scale", "time"):
            layer = nn.Linear(self.embed_dim, self.embed_dim)
            setattr(self, f"{name}_fc", layer)
            token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
            setattr(self, f"{name}_token", token)


class CopernicusBackbone(ViTBackbone):
    """Copernicus-FM: place, date and area are added where they are known.

    Attributes:
        resolution: ground size of a pixel in metres, or None where it is not known.
    """

    resolution: float | None

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, D, h, w)."""
        patches = self.model.patch_embed(image)  # (B, h, w, D)
        tokens = self.add_positions(patches)  # (B, 1 + h*w, D)
        added = self.metadata(meta or {}, image.shape[0]).to(tokens)  # (B or 1, 1, D)
        return self.read_blocks(tokens + added, *patches.shape[1:3])

    def metadata(self, meta: Meta, count: int) -> Tensor:
        """Codes of place, area and time (B or 1, 1, D); learned tokens if unknown."""
        model: Any = self.model
        place, area, time = model.coord_token, model.scale_token, model.time_token
        lonlat, date = _known(meta, "lonlat"), _known(meta, "date")
        if lonlat is not None:
            lonlat = lonlat.to(place.device)  # (B, 2)
            shifted = lonlat + lonlat.new_tensor([180.0, 90.0])
            code = model.coord_expansion(shifted, self.card.width // 2)  # (B, 2, D/2)
            place = code.flatten(1)[:, None].to(place)  # (B, 1, D)
        if self.resolution is not None:
            side = self.strides[-1] * self.resolution / 1000  # km
            code = model.scale_expansion(
                torch.full((count,), side * side, device=area.device), self.card.width
            )  # (B, D)
            area = code[:, None].to(area)  # (B, 1, D)
        if date is not None:
            days = days_since_1970(date[:, 0]).to(time.device)  # (B,)
            time = model.time_expansion(days, self.card.width)[:, None].to(time)
        return model.coord_fc(place) + model.scale_fc(area) + model.time_fc(time)


def _known(meta: Meta, key: str) -> Tensor | None:
    """An entry; None if missing or, as in torchgeo, not a number for one image."""
    value = meta.get(key)
    return None if value is None or value.isnan().any() else value


def days_since_1970(date: Tensor) -> Tensor:
    """(B, 2: year, day of year from 0) -> (B,) days since 1 January 1970."""
    before = date[:, 0].double() - 1  # whole years before the image's own
    leaps = (before // 4) - (before // 100) + (before // 400)
    return before * 365 + leaps + 1 + date[:, 1] - _EPOCH


@register("copernicusfm")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    patch: int = 16,
    resolution: float | None = None,
) -> CopernicusBackbone:
    """Build Copernicus-FM's encoder for images, without its branch for named variables.

    Layer norms have eps 1e-5, as in torchgeo's class; the authors' own code has 1e-6.
    Random weights get the sine-cosine positions that torchgeo leaves at zero.

    Args:
        card, plan, state: as for every builder; each band needs a wavelength, or is
            radar.
        patch: patch size in pixels, 3 to 64; kernels are resized from 16.
        resolution: ground size of a pixel in metres, which gives the area of a patch;
            None leaves it unknown.
    """
    if type(patch) is not int or patch not in _PATCHES:
        raise ValueError(f"patch={patch!r}: {card.name} takes 3 to 64 whole pixels")
    if resolution is not None:
        resolution = ground_size(resolution)

    def bandwidths(names: Sequence[str]) -> list[float]:
        return [MICRO_TO_NANO * float(BANDS[n].bandwidth_um or 0) for n in names]

    def nanometres(names: Sequence[str]) -> list[float]:
        return [MICRO_TO_NANO * value for value in wavelengths(names)]

    def patches() -> CopernicusPatches:
        from torchgeo.models.copernicusfm import DynamicPatchEmbed

        embed = DynamicPatchEmbed(128, card.patch, card.width)
        made = CopernicusPatches(embed, patch, card.image_size // card.patch)
        made.wavelengths = described(plan, _RADAR_WAVELENGTHS, nanometres)
        made.bandwidths = described(plan, _RADAR_BANDWIDTHS, bandwidths)
        # Bands are constants of the network, and a look at values cannot be exported.
        embed.spectrum_central_expansion.assert_range = False
        embed.spectrum_bandwidth_expansion.assert_range = False
        return made

    dropped = ("patch_embed_variable.", "fc_norm.", "norm.", "head.")
    model = spectral_network(
        card,
        state,
        patches,
        dropped,
        kind=CopernicusViT,
        final_norm=False,
        epsilon=1e-5,
    )
    backbone = CopernicusBackbone(card, model, plan)
    backbone.resolution = resolution
    return backbone
