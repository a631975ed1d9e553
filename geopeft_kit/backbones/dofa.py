"""DOFA: a ViT whose kernels come from wavelengths, in micrometres.

Source: Xiong et al. 2024, DOFA, arXiv 2403.15356; torchgeo (MIT); radar's number from
the authors' README.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.card import BackboneCard, WeightFile
from geopeft_kit.backbones.spectral import (
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

# The authors hand in Sentinel-1's frequency in GHz where a wavelength is expected.
_RADAR = {"VV": 5.405, "VH": 5.405}


class DofaPatches(SpectralPatches):
    """Kernels from `wavelengths` in micrometres."""

    wavelengths: Sequence[float]

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h*w, D)."""
        waves = torch.tensor(self.wavelengths, device=image.device)  # (C,)
        return self.embed(image, waves)[0]


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
) -> ViTBackbone:
    """Build DOFA's encoder; each band needs a wavelength, or is radar.

    `state` is in torchgeo's or the authors' key layout. None gives random weights, with
    the sine-cosine positions that torchgeo leaves at zero.
    """

    def patches() -> DofaPatches:
        from torchgeo.models.dofa import DOFAEmbedding

        embed = DOFAEmbedding(128, card.patch, card.width)
        made = DofaPatches(embed, card.patch, card.image_size // card.patch)
        made.wavelengths = described(plan, _RADAR, wavelengths)
        return made

    # Published without the last norm; the authors' own file has one, and a projector.
    dropped = ("mask_token", "norm.", "fc_norm.", "projector.", "head.")
    model = spectral_network(card, state, patches, dropped, final_norm=False)
    return ViTBackbone(card, model, plan)


def _card(
    name: str, width: int, depth: int, heads: int, parameters: int
) -> BackboneCard:
    weights = WeightFile(torchgeo=f"DOFA{name.title()}16_Weights.DOFA_MAE")
    return BackboneCard(
        name=f"dofa_{name}",
        family="dofa",
        bands=SENTINEL2,
        also_reads=beyond_sentinel2(("VV", "VH")),
        patch=16,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=224,
        normalisation=S2_STATISTICS,
        licence_weights=LICENCE,
        licence_code="MIT (torchgeo), Apache-2.0 (timm)",
        source="https://github.com/zhu-xlab/DOFA",
        weights={"default": weights, "mae": weights},
        architecture={"heads": heads},
        paper="arXiv 2403.15356",
        notes="Masked autoencoder on five sensors; kernels are made from wavelengths "
        "in micrometres." + NO_STATISTICS + DECIBEL,
        cannot="The last map has no final norm: none is published. Radar bands share "
        "one number, so that VV and VH meet the same kernel." + NOT_SEEN,
    )


CARDS = (
    _card("base", 768, 12, 12, 111_159_296),
    _card("large", 1024, 24, 16, 336_901_632),
)
