"""Panopticon: one kernel for all bands, told apart by their wavelength in nanometres.

Source: Waldmann et al. 2025, Panopticon, arXiv 2503.10845; torchgeo (MIT), in whose
code a negative number stands for a polarisation.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.card import BackboneCard, WeightFile
from geopeft_kit.backbones.spectral import (
    MICRO_TO_NANO,
    NO_STATISTICS,
    NOT_SEEN,
    SpectralPatches,
    described,
    spectral_network,
)
from geopeft_kit.backbones.torchgeo_facts import (
    DECIBEL,
    LICENCE,
    S2_STATISTICS,
    SENTINEL2,
    beyond_sentinel2,
)
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.bands import wavelengths

# Transmitted and received polarisation, orbit unknown.
_RADAR = {"VV": -1, "VH": -2, "HH": -3, "HV": -4}


class PanopticonPatches(SpectralPatches):
    """One kernel for all bands; `channels` are nanometres, or negative for radar."""

    channels: Sequence[int]

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D)."""
        # A new tensor every time: torchgeo writes into it.
        ids = torch.tensor([self.channels] * len(image), device=image.device)
        return self.embed({"imgs": image, "chn_ids": ids})


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> ViTBackbone:
    """Build Panopticon's encoder, with the table of its file (37 x 37 patches).

    Each band needs a wavelength, or is radar. `state` is in the authors' key layout,
    with or without torchgeo's prefix ``model.``; None gives random weights.
    """

    def nanometres(names: Sequence[str]) -> list[int]:
        return [round(MICRO_TO_NANO * value) for value in wavelengths(names)]

    def patches() -> PanopticonPatches:
        from torchgeo.models.panopticon import PanopticonPE

        embed = PanopticonPE(
            attn_dim=card.architecture["attention_width"],
            embed_dim=card.width,
            patch_size=card.patch,
            chnfus_cfg={"attn_cfg": {"num_heads": 16}},
        )
        made = PanopticonPatches(embed, card.patch, card.architecture["side"])
        made.channels = described(plan, _RADAR, nanometres)
        return made

    model = spectral_network(card, state, patches, ("mask_token",), init_values=1e-5)
    return ViTBackbone(card, model, plan)


_FILE = WeightFile(torchgeo="Panopticon_Weights.VIT_BASE14")
PANOPTICON_BASE = BackboneCard(
    name="panopticon_base",
    family="panopticon",
    bands=SENTINEL2,
    also_reads=beyond_sentinel2(("VV", "VH", "HH", "HV")),
    patch=14,
    width=768,
    depth=12,
    parameters=98_975_232,
    image_size=224,
    normalisation=S2_STATISTICS,
    licence_weights=LICENCE,
    licence_code="MIT (torchgeo), Apache-2.0 (timm)",
    source="https://github.com/Panopticon-FM/panopticon",
    weights={"default": _FILE, "dinov2": _FILE},
    architecture={"heads": 12, "attention_width": 2304, "side": 37},
    paper="arXiv 2503.10845",
    notes="DINOv2 on several sensors; one kernel for all bands, told apart by their "
    "wavelength in nanometres and joined by attention. Orbits of radar are left open."
    + NO_STATISTICS
    + DECIBEL,
    cannot="Patches of 14 px: image sides are multiples of 14." + NOT_SEEN,
)

CARDS = (PANOPTICON_BASE,)
