"""Between a backbone's feature maps and a decoder: standardisation and the pyramid.

`Standardise` gives every channel mean 0 and spread 1, `Pyramid` turns the four
equally sized maps of a plain ViT into the four scales that a UNet or UPerNet
expects. Both belong to the decoder: they are saved with it and what they train is
counted as the decoder's.

Source: the pyramid follows the idea of "LearnedInterpolateToPyramidal" in TerraTorch
(Apache-2.0) and of ViTDet's simple feature pyramid (arXiv 2203.16527, section 3).
Notebooks: 02 (why features are standardised), 07 (necks and decoders).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS_PER_GROUP = 16


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with about 16 channels a group, 2 * channels parameters.

    Unlike batch normalisation it does the same for one image as for a hundred, works on
    a 1x1 map, and has no running statistics to freeze, resume or synchronise.

    Source: Wu and He 2018, arXiv 1803.08494, section 4.1 (16 channels a group).
    """
    most = max(1, channels // CHANNELS_PER_GROUP)
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class Standardise(nn.Module):
    """Shifts and scales each channel by constants measured on training features.

    It changes nothing until `set_statistics` is called. A fresh head on features that
    spread over 0.15 only, as a ViT's tokens may, stays under-trained, which looks like
    a weakness of the backbone.
    """

    mean: Tensor
    std: Tensor
    calibrated: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Buffers: never trained, but saved with the decoder and moved with it.
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("calibrated", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> the same, in the wider type (float32 for float16)."""
        shape = (1, -1, 1, 1)
        return (features - self.mean.view(shape)) / self.std.view(shape)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and std, (C,) each; a channel that does not vary keeps the scale 1.

        Raises ValueError for a value that is not finite.
        """
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise ValueError(
                "the features hold NaN or infinite values, so the decoder cannot be "
                "calibrated on them. Look for NaN or nodata in the images first."
            )
        varies = std > 1e-6 * (1.0 + mean.abs())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, torch.ones_like(std)))
        self.calibrated.fill_(True)


@torch.no_grad()
def channel_statistics(
    batches: Iterable[Sequence[Tensor]],
) -> list[tuple[Tensor, Tensor]]:
    """One (mean, std) pair per map, (C_i,) float64 on the CPU, over all batches.

    Batches are lists of maps (B, C_i, h_i, w_i). They count by their number of places:
    the result is that of one large batch. Raises ValueError if there is none.

    Source: the pairwise update of Chan, Golub and LeVeque 1979.
    """
    totals: list[tuple[float, Tensor, Tensor]] = []
    for maps in batches:
        parts = [_moments(features) for features in maps]
        merged = zip(totals, parts, strict=True) if totals else ()
        totals = [_merge(a, b) for a, b in merged] or parts
    if not totals:
        raise ValueError(
            "calibrate got no batch of features. Give at least one, for example "
            "model.calibrate(model.features(batch['image']) for batch in loader)."
        )
    return [(mean, (square / count).sqrt()) for count, mean, square in totals]


def _moments(features: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of one map, (C,) each."""
    var, mean = torch.var_mean(features.float(), dim=(0, 2, 3), correction=0)
    count = float(features.numel() // features.shape[1])
    return count, mean.cpu().double(), var.cpu().double() * count


def _merge(
    a: tuple[float, Tensor, Tensor], b: tuple[float, Tensor, Tensor]
) -> tuple[float, Tensor, Tensor]:
    """Moments of two samples taken together."""
    count, gap = a[0] + b[0], b[1] - a[1]
    mean = a[1] + gap * (b[0] / count)
    square = a[2] + b[2] + gap.square() * (a[0] * b[0] / count)
    return count, mean, square


class Pyramid(nn.Module):
    """Four maps of one stride p become strides p/4, p/2, p and 2p.

    The first two are enlarged by transposed convolutions, but not beyond pixels; the
    fourth is max-pooled. Channels become ``[C/4, C/2, C, C]`` for p of 4 and more.
    """

    def __init__(self, channels: Sequence[int], stride: int) -> None:
        super().__init__()
        steps = (min(2, _halvings(stride)), min(1, _halvings(stride)))
        self.enlarge = nn.ModuleList(
            _enlarge(c, n) for c, n in zip(channels[:2], steps, strict=True)
        )
        self.channels = [c >> n for c, n in zip(channels[:2], steps, strict=True)]
        self.channels += list(channels[2:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, C_i, h, w) -> sizes 4h, 2h, h and h/2 (p of 4 and more).

        An odd h or w is first made even by repeating the last row or column.
        """
        a, b, c, d = (pad_to_multiple(m, 2) for m in maps)
        return [self.enlarge[0](a), self.enlarge[1](b), c, F.max_pool2d(d, 2)]


def _halvings(stride: int) -> int:
    """How often a cell of `stride` pixels can be halved before it is one pixel."""
    return max(0, stride.bit_length() - 1)


def _enlarge(channels: int, steps: int) -> nn.Sequential:
    """`steps` transposed convolutions, each twice the size and half the channels."""
    layers: list[nn.Module] = []
    for step in range(steps):
        if step:
            layers += [group_norm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return nn.Sequential(*layers)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples (pixels).

    Cropping back is ``[..., :H, :W]``.
    """
    for axis in (-2, -1):
        length = image.shape[axis]
        padded = -(-length // multiple) * multiple
        if padded != length:
            # Clamped indices also serve images smaller than their padding.
            index = torch.arange(padded, device=image.device).clamp_(max=length - 1)
            image = image.index_select(axis, index)
    return image
