"""GFM: the Swin-B of continual pretraining (Mendieta et al.), on timm's Swin.

Source: arXiv 2302.04476; key names from github.com/mmendiet/GFM (Apache-2.0), which
are those of SimMIM around Microsoft's Swin.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile
from geopeft_kit.backbones.hierarchical import HierarchicalBackbone
from geopeft_kit.backbones.rgb_vits import IMAGENET, PICTURES, RGB
from geopeft_kit.backbones.weights import State, load_strictly

_PRETRAINED_WINDOW = 6
# Sizes between which the authors fine-tune with windows of a 32nd of the image.
_SMALLEST, _LARGEST = 128, 256
_MASK_TOKEN = "encoder.mask_token"


class GFMBackbone(HierarchicalBackbone):
    """GFM's Swin-B; the four maps are the stages' outputs, before each merging.

    Attributes:
        mask_token: (1, 1, 128), what stood for hidden patches in pretraining; not used
            by `forward`. None without a checkpoint that has it.
    """

    mask_token: Tensor | None


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    image_size: int | None = None,
    window: int | None = None,
) -> GFMBackbone:
    """Build GFM's student encoder.

    Args:
        card: sizes and bands.
        plan: the bands of the user's images.
        state: `gfm.pth` or an encoder in the same key layout; None for random weights.
        image_size: determines the windows, see `window`. Other sizes run, padded.
        window: side of the attention windows in cells; the bias tables are resized.
            None: a 32nd of the image from 128 to 256 px, as the authors fine-tune (no
            padding), else that of pretraining, 6.

    Raises:
        ValueError: for a window below 1, or a checkpoint that does not fit.
    """
    size = image_size or card.image_size
    if window is None:
        fits = _SMALLEST <= size <= _LARGEST and size % 32 == 0
        window = size // 32 if fits else _PRETRAINED_WINDOW
    if type(window) is not int or window < 1:
        raise ValueError(f"window={window!r}: a whole number of cells, 1 or more")
    sizes = card.architecture
    model = SwinTransformer(
        img_size=max(size, 32),
        window_size=window,
        embed_dim=sizes["embed_dim"],
        depths=sizes["depths"],
        num_heads=sizes["heads"],
        num_classes=0,
        drop_path_rate=0.0,
        strict_img_size=False,
    )
    mask_token = None
    if state is not None:
        kept, mask_token = _encoder(state)
        # Microsoft's names as timm's, which has each merging in the next stage.
        load_strictly(model, checkpoint_filter_fn(kept, model), card.name)
    adapt_kernels(model.get_submodule("patch_embed.proj"), plan)
    backbone = GFMBackbone(card, model, plan, "swin")
    backbone.register_buffer("mask_token", mask_token, persistent=False)
    return backbone


def _encoder(state: Mapping[str, Tensor]) -> tuple[State, Tensor | None]:
    """The student's encoder without its prefix, and its mask token."""
    kept = {
        key.removeprefix("encoder."): tensor
        for key, tensor in state.items()
        if key.startswith("encoder.") and key != _MASK_TOKEN
    }
    return kept or dict(state), state.get(_MASK_TOKEN)


GFM_SWIN_BASE = BackboneCard(
    name="gfm_swin_base",
    family="gfm",
    bands=RGB,
    patch=4,
    width=1024,
    depth=24,
    parameters=86_725_176,
    image_size=192,
    normalisation=Normalisation(1.0, *IMAGENET),
    licence_weights="not stated with the file: see the source (code: Apache-2.0)",
    licence_code="Apache-2.0",
    source="https://github.com/mmendiet/GFM",
    weights={"default": WeightFile("gfm.pth", repo="torchgeo/gfm")},
    architecture={"embed_dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    paper="arXiv 2302.04476",
    notes="Swin-B, masked modelling on GeoPile with an ImageNet-22k teacher. The hub's "
    "copy is rehosted from the authors' OneDrive. Windows of 6 cells at 192 px; at 128 "
    "to 256 px windows of a 32nd of the image, as the authors fine-tune." + PICTURES,
    cannot="Knows red, green and blue only. The published file was not at hand: key "
    "names are those of the authors' code.",
)

CARDS = (GFM_SWIN_BASE,)
