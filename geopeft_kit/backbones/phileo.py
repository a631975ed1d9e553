"""PhilEO's Geo-Aware U-Net: a convolutional network that is locked to 128 px.

Its layer norms have an own gain and shift for every channel *and every pixel*: of the
44 million numbers 55 % are such maps, 39 % the dense bottleneck, 6.5 % convolutions.
So it takes images of one size only, and norm tuning trains 24 million numbers here.

`phileo_unet.py` holds the network.

Source: "Scaling Laws for Geospatial Foundation Models" (PhilEO on MajorTOM), arXiv
2506.14765, and its public code (github.com/ESA-PhiLab/PhilEO-MajorTOM).
Taught in notebook 11 (architectures and few labels).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard, Normalisation
from geopeft_kit.backbones.phileo_unet import CNNBlock, GeoAwareUNet
from geopeft_kit.backbones.weights import load_strictly, strip_prefixes


class PhilEOUNetBackbone(Backbone):
    """The four finest maps of the decoder, at strides 1, 2, 4 and 8."""

    layout = "unet"
    model: GeoAwareUNet

    def __init__(self, card: BackboneCard, model: GeoAwareUNet, plan: BandPlan) -> None:
        super().__init__(card, model, plan)
        self.channels = list(card.architecture["dims"][:4])
        self.strides = [1, 2, 4, 8]

    @property
    def block_paths(self) -> list[str]:
        """``encoder.blocks_down.0.0`` ... then ``decoder.blocks_up.0.0`` ..."""
        return [
            name for name, m in self.model.named_modules() if isinstance(m, CNNBlock)
        ][1:-1]  # without stem and head

    def forward_maps(self, image: Tensor, meta: Meta | None) -> list[Tensor]:
        """Normalised image (B, C, H, W) -> four maps (B, C_i, H_i, W_i)."""
        check_locked(self.card, image)
        vector, skips = self.model.encoder(self.model.stem(image))
        return self.model.decoder(vector, skips)[:4]


def build(
    card: BackboneCard,
    plan: BandPlan,
    state: Mapping[str, Tensor] | None,
    image_size: int | None = None,
) -> PhilEOUNetBackbone:
    """Build the whole Geo-Aware U-Net.

    `state` is in the upstream's key layout, or None for random weights. The network
    takes the card's image size only; another one raises ValueError.
    """
    if image_size not in (None, card.image_size):
        raise ValueError(locked(card, f"image_size={image_size}"))
    sizes = card.architecture
    arguments = sizes["dims"], sizes["depths"], card.image_size, sizes["latent"]
    if state is None:
        model = GeoAwareUNet(len(card.bands), *arguments)
    else:
        with torch.device("meta"):  # no memory and no time for random numbers
            model = GeoAwareUNet(len(card.bands), *arguments)
        load_strictly(model, strip_prefixes(state, ("module.",)), card.name)
    adapt_kernels(model.stem.conv1, plan)
    if model.stem.matcher is not None:
        adapt_kernels(model.stem.matcher, plan)
    return PhilEOUNetBackbone(card, model, plan)


def check_locked(card: BackboneCard, image: Tensor) -> None:
    """Refuse images (B, C, H, W) of another size than the card's."""
    height, width = image.shape[-2:]
    if (height, width) != (card.image_size, card.image_size):
        raise ValueError(locked(card, f"image is {height} x {width} px"))


def locked(card: BackboneCard, what: str) -> str:
    """What to say about another image size."""
    size = card.image_size
    return (
        f"{what}: {card.name} is locked to {size} x {size} px, since its layer norms "
        "have a gain and a shift for every pixel. Cut your images to that size "
        f"(predict_scene: window={size}), or take another backbone"
    )


# In the order of the authors' data loader.
BANDS = (
    "BLUE",
    "GREEN",
    "RED",
    "NIR_BROAD",
    "RED_EDGE_1",
    "RED_EDGE_2",
    "RED_EDGE_3",
    "NIR_NARROW",
    "SWIR_1",
    "SWIR_2",
)
REFLECTANCE = Normalisation(1.0, (0.0,) * len(BANDS), (1.0,) * len(BANDS))
SOURCE = "https://github.com/ESA-PhiLab/PhilEO-MajorTOM"
LICENCE = "not confirmed: see the source"
OBTAIN = (
    "Open https://huggingface.co/NikolaosDionelis2023/GeoAware-ModelWeights, which the "
    "authors' README names, and download the checkpoint by hand (its files were not "
    "seen; bands and key names are those of the authors' code)"
)


def _card(size: str, factor: int, parameters: int, notes: str) -> BackboneCard:
    dims = tuple(factor * width for width in (32, 32, 64, 64, 128))
    depths = (3, 3, 4, 4, 5)
    return BackboneCard(
        name=f"phileo_unet_{size}",
        family="phileo_unet",
        bands=BANDS,
        patch=1,
        width=dims[-1],
        depth=2 * sum(depths),
        parameters=parameters,
        image_size=128,
        normalisation=REFLECTANCE,
        licence_weights=LICENCE,
        licence_code="Apache-2.0",
        source=SOURCE,
        architecture={"dims": dims, "depths": depths, "latent": 1024},
        paper="arXiv 2506.14765",
        notes="U-Net with spatial layer norms, reconstruction plus geographic labels "
        "on MajorTOM. The maps are the four finest of its own decoder, strides 1, 2, "
        "4, 8. parameters counts it whole, with the heads of pretraining." + notes,
        cannot="Locked to 128 x 128 px. The maps do not pass through the heads of "
        "pretraining (0.7 M). Norm tuning trains more than half of it. No published "
        "file was at hand: key names are those of the authors' code.",
        obtain=OBTAIN,
    )


CARDS = (
    _card("44m", 1, 43_667_714, ""),
    _card(
        "200m",
        4,
        206_860_610,
        " Four times the widths of the 44M model is our inference: it is the simple "
        "multiple that meets the paper's size and FLOPs.",
    ),
)
