"""PhilEO's Geo-Aware U-Net: a convolutional network that is locked to 128 px.

Its layer norms have a gain and a shift for every channel *and every pixel*: of the
44 million parameters 55 % are such maps, 39 % the dense bottleneck, 6.5 % convolutions.
So it takes images of one size only, and norm tuning trains 24 million parameters here.
Written from the formulas, with the upstream's names.

Source: "Scaling Laws for Geospatial Foundation Models" (PhilEO on MajorTOM), arXiv
2506.14765, and its public code (github.com/ESA-PhiLab/PhilEO-MajorTOM).
Taught in notebook 11 (architectures and few labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.band_plan import BandPlan
from geopeft_kit.backbones.base import Backbone, Meta, adapt_kernels
from geopeft_kit.backbones.card import BackboneCard
from geopeft_kit.backbones.registry import register
from geopeft_kit.backbones.weights import State, filled, strip_prefixes

_REDUCTION = 16


class ScaleSkip2D(nn.Module):
    """Add two maps, each with a gain and a shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def around(start: float) -> nn.Parameter:
            return nn.Parameter(start + 0.01 * torch.randn(1, channels, 1, 1))

        self.x_skipscale, self.y_skipscale = around(1), around(1)
        self.x_skipbias, self.y_skipbias = around(0), around(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, C, H, W) both -> (B, C, H, W)."""
        x = x * self.x_skipscale + self.x_skipbias
        return x + y * self.y_skipscale + self.y_skipbias


class SqueezeExcite(nn.Module):
    """A gain per channel, from the mean of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // _REDUCTION)
        self.excitation = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.excitation(x.mean((2, 3)))[:, :, None, None]


class CNNBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolution with spatial layer norms, and a scaled shortcut.

    `size` is height and width in cells; `last_act` (None for `act`) follows the sum.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        act: nn.Module,
        last_act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.squeeze = SqueezeExcite(outputs)
        self.matcher = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)
        )
        self.norm1 = nn.LayerNorm([outputs, size, size])
        self.norm2 = nn.LayerNorm([outputs, size, size])
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.conv2 = _border_conv(outputs, outputs)
        self.conv3 = nn.Conv2d(outputs, outputs, 1)
        self.scaler = ScaleSkip2D(outputs)
        self.act, self.last_act = act, last_act or act

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, size, size) -> (B, outputs, size, size)."""
        identity = x if self.matcher is None else self.matcher(x)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.squeeze(self.conv3(x))
        return self.last_act(self.scaler(x, identity))


class Encoder(nn.Module):
    """The contracting path, and the bottleneck's vector of length `latent`.

    `dims` and `depths` are channels and blocks per level, `size` is in pixels.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        size: int,
        latent: int,
        act: nn.Module,
    ) -> None:
        super().__init__()
        sizes = [size // 2**level for level in range(len(dims))]
        self.downsample = nn.ModuleList(
            nn.Sequential(nn.Conv2d(here, there, 1), nn.MaxPool2d(2))
            for here, there in zip(dims[:-1], dims[1:], strict=True)
        )
        self.block_scalers = nn.ModuleList(ScaleSkip2D(d) for d in dims)
        self.blocks_down = _levels(dims, depths, sizes, act)
        self.prelinear_norm = nn.LayerNorm([dims[-1], sizes[-1], sizes[-1]])
        self.linear_encode = nn.Sequential(
            act, nn.Linear(dims[-1] * sizes[-1] ** 2, latent), nn.LayerNorm(latent)
        )
        # The heads of pretraining, which no map passes through.
        self.head_clouds = nn.Sequential(nn.Linear(latent, 4))
        self.head_landcover = nn.Sequential(nn.Linear(latent, 11))
        self.head_buildings = nn.Sequential(nn.Linear(latent, 1), nn.Sigmoid())
        self.head_coords = nn.Sequential(nn.Linear(latent, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> the vector (B, latent), and one map a level, fine first."""
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.blocks_down):
            x = self.block_scalers[level](blocks(x), x)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        return self.linear_encode(self.prelinear_norm(x).flatten(1)), skips


class Decoder(nn.Module):
    """The expanding path from the vector, joined by the encoder's maps."""

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        size: int,
        latent: int,
        act: nn.Module,
    ) -> None:
        super().__init__()
        dims, depths = dims[::-1], depths[::-1]
        sizes = [size // 2**level for level in range(len(dims))][::-1]
        self.start = (dims[0], sizes[0], sizes[0])
        self.linear_decode = nn.Linear(latent, dims[0] * sizes[0] ** 2)
        self.latent_norm = nn.LayerNorm(self.start)
        self.prehead_norm = nn.LayerNorm([dims[-1], size, size])
        self.skip_scalers = nn.ModuleList(ScaleSkip2D(d) for d in dims)
        self.block_scalers = nn.ModuleList(ScaleSkip2D(d) for d in dims)
        self.blocks_up = _levels(dims, depths, sizes, act)
        self.upsamplers = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                _border_conv(dims[level], dims[level + 1]),
                nn.LayerNorm([dims[level + 1], sizes[level + 1], sizes[level + 1]]),
                act,
            )
            for level in range(len(dims) - 1)
        )

    def forward(self, vector: Tensor, skips: list[Tensor]) -> list[Tensor]:
        """(B, latent) and the encoder's maps -> one map a level, fine first."""
        x = self.latent_norm(self.linear_decode(vector).unflatten(1, self.start))
        maps: list[Tensor] = []
        for level, blocks in enumerate(self.blocks_up):
            x = self.skip_scalers[level](x, skips[-1 - level])
            x = self.block_scalers[level](blocks(x), x)
            maps.append(x)
            if level < len(self.upsamplers):
                x = self.upsamplers[level](x)
        maps[-1] = self.prehead_norm(x)
        return maps[::-1]


class GeoAwareUNet(nn.Module):
    """Stem, encoder, decoder, and the head that reconstructs the image."""

    def __init__(
        self,
        bands: int,
        dims: Sequence[int],
        depths: Sequence[int],
        size: int,
        latent: int,
    ) -> None:
        super().__init__()
        act = nn.GELU()
        self.stem = CNNBlock(bands, dims[0], size, act)
        self.encoder = Encoder(dims, depths, size, latent, act)
        self.decoder = Decoder(dims, depths, size, latent, act)
        self.head = CNNBlock(dims[0], bands, size, act, nn.Sigmoid())


def _levels(
    dims: Sequence[int], depths: Sequence[int], sizes: Sequence[int], act: nn.Module
) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(*(CNNBlock(width, width, size, act) for _ in range(depth)))
        for width, depth, size in zip(dims, depths, sizes, strict=True)
    )


def _border_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3, padded with the values at the border."""
    return nn.Conv2d(
        inputs, outputs, 3, padding=1, bias=False, padding_mode="replicate"
    )


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


@register("phileo_unet")
def build(
    card: BackboneCard,
    plan: BandPlan,
    state: State | None,
    image_size: int | None = None,
) -> PhilEOUNetBackbone:
    """Build the whole Geo-Aware U-Net; it takes the card's image size only."""
    if image_size not in (None, card.image_size):
        raise ValueError(locked(card, f"image_size={image_size}"))
    kept = None if state is None else strip_prefixes(state, ("module.",))
    sizes = card.architecture
    arguments = sizes["dims"], sizes["depths"], card.image_size, sizes["latent"]
    network = partial(GeoAwareUNet, len(card.bands), *arguments)
    model = filled(network, kept, card.name)
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
    """The message about another image size."""
    size = card.image_size
    return (
        f"{what}: {card.name} is locked to {size} x {size} px, since its layer norms "
        "have a gain and a shift for every pixel. Cut your images to that size "
        f"(predict_scene: window={size}), or take another backbone"
    )
