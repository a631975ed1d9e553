"""Scale-MAE, whose positions are counted on the ground: torchgeo's own class.

torchgeo is imported when one is built.

Source: torchgeo (MIT); Reed et al. 2023, Scale-MAE, arXiv 2212.14532.
Taught in notebook 05 (DEFLECT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.rgb_vits import (
    IMAGENET,
    PICTURES,
    RGB,
    fixed_table,
    network,
)
from geopeft_kit.backbones.vit import ViTBackbone
from geopeft_kit.backbones.weights import load_strictly, strip_prefixes

# What Scale-MAE's pretraining has besides the encoder, and the table that is computed.
_NOT_ENCODER = (
    "decoder",
    "mask_token",
    "pos_embed",
    "pos_emb_projection.",
    "fpn.",
    "fcn_",
    "head.",
)


class ScaleMAEBackbone(ViTBackbone):
    """Scale-MAE: positions are counted on the ground, not in patches.

    Attributes:
        resolution: ground size of a pixel in metres; may be changed at any time.
    """

    resolution: float

    def add_positions(self, patches: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, 1 + h*w, D); computed for the grid of each image."""
        height, breadth, width = patches.shape[1:]
        table = fixed_table(width, height, breadth, self.resolution, patches.device)
        tokens = patches.flatten(1, 2) + table.to(patches.dtype)  # (B, h*w, D)
        assert self.model.cls_token is not None
        first = self.model.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)


def build_scalemae(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    resolution: float = 1.0,
) -> ScaleMAEBackbone:
    """Build Scale-MAE's encoder.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: checkpoint in torchgeo's or the authors' key layout, or None for random
            weights.
        resolution: ground size of a pixel in metres; 1 is torchgeo's default, and
            Sentinel-2 has 10. A user separated EuroSAT better with 1 than with 10
            (issue 1 of bair-climate-initiative/scale-mae), so try both.

    Raises:
        ValueError: for a resolution that is not above 0, or a checkpoint that does not
            fit.
    """
    from torchgeo.models.scale_mae import ScaleMAE

    number = isinstance(resolution, int | float) and not isinstance(resolution, bool)
    if not (number and 0 < resolution < float("inf")):
        raise ValueError(f"resolution={resolution!r}: metres per pixel, above 0")
    model = network(
        card, state, card.patch, card.image_size, ScaleMAE, res=float(resolution)
    )
    # torchgeo keeps a table that its own forward never reads.
    model.register_parameter("pos_embed", None)
    if state is not None:
        kept = strip_prefixes(state, ("module.",))
        kept = {key: t for key, t in kept.items() if not key.startswith(_NOT_ENCODER)}
        load_strictly(model, kept, card.name)
    adapt_kernels(model.patch_embed.proj, plan)
    backbone = ScaleMAEBackbone(card, model, plan)
    backbone.resolution = float(resolution)
    return backbone


SCALEMAE_LARGE = BackboneCard(
    name="scalemae_large",
    family="scalemae",
    bands=RGB,
    patch=16,
    width=1024,
    depth=24,
    parameters=303_099_904,
    image_size=224,
    normalisation=Normalisation(1.0, *IMAGENET),
    licence_weights="not stated by torchgeo: see the source",
    licence_code="MIT",
    source="https://github.com/bair-climate-initiative/scale-mae",
    weights={"default": WeightFile(torchgeo="ScaleMAELarge16_Weights.FMOW_RGB")},
    architecture={"heads": 16},
    paper="arXiv 2212.14532",
    notes="ViT-L, masked autoencoder on fMoW RGB at several scales; the option "
    "resolution says how many metres a pixel is (default 1)." + PICTURES,
    cannot="Knows red, green and blue only. The published file was not at hand: key "
    "names are those of torchgeo's class and of the authors' code.",
)

CARDS = (SCALEMAE_LARGE,)
