"""What all decoders share: standardise, decode, crop, and say what does not fit.

Notebook: 07.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from geopeft_kit.decoders.neck import Standardise


class Decoder(nn.Module):
    """What all decoders share: standardise, decode, resize, crop.

    A subclass sets `reads`, calls this constructor, and implements `decode`.

    `reads` says which of the four maps it uses; `head` is the layer that knows the
    classes.

    Args:
        channels: channels of the backbone's four maps.
        strides: their strides, pixels, from fine to coarse.
        outputs: output channels K.
        dropout: chance of a feature to be zeroed in front of the head.
        all_scales: read all four maps, even if the decoder needs only the last one.
    """

    reads: tuple[int, ...] = (3,)
    head: nn.Module

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
        all_scales: bool = False,
    ) -> None:
        super().__init__()
        if all_scales:
            self.reads = (0, 1, 2, 3)
        self.channels = [channels[i] for i in self.reads]
        self.strides = [strides[i] for i in self.reads]
        self.outputs = outputs
        self.multiple = math.lcm(*strides)
        self.standardise = nn.ModuleList(Standardise(c) for c in self.channels)
        self.dropout = nn.Dropout(dropout)

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Standardised maps -> logits (B, K, h', w') that cover at least the grid."""
        raise NotImplementedError

    @property
    def last_layers(self) -> list[Any]:
        """The layers whose answers are added up: the head alone, in most decoders."""
        return [self.head]

    def start(self, reach: float = 2.0) -> None:
        """Draw the last layer: weights with deviation reach / n, n its inputs; bias 0.

        A step of Adam moves every weight equally, so n inputs move an answer n times as
        far as one. With 1/n, narrow and wide decoders leave their first answers equally
        fast. `reach` is 2 for logits, and less for small values.

        Source: the output layer of muP, Yang et al. 2022, arXiv 2203.03466, table 3; 2
        is measured (benchmarks/decoder_start.py).
        """
        for layer in self.last_layers:
            transposed = isinstance(layer, nn.ConvTranspose2d)  # (inputs, K, s, s)
            inputs = layer.weight.shape[0 if transposed else 1]
            nn.init.normal_(layer.weight, std=reach / inputs)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Decode the maps named in `reads` to logits (B, K, H, W).

        `maps` are (B, C_i, H'/stride_i, W'/stride_i), where H', W' is the image padded
        to a multiple of all strides, and `size` is (H, W), in pixels. Raises ValueError
        for maps that the decoder was not built for.
        """
        grid = self.check(maps, size)
        # A list of its own: the caller's cached maps are never written to.
        ready = [s(m) for s, m in zip(self.standardise, maps, strict=True)]
        return self.decode(ready, grid)[..., : size[0], : size[1]]

    def check(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[int, int]:
        """Padded image size (H', W'); an error where the maps do not belong to it."""
        grid = tuple(-(-n // self.multiple) * self.multiple for n in size)
        wanted = [
            (c, grid[0] // s, grid[1] // s)
            for c, s in zip(self.channels, self.strides, strict=True)
        ]
        given = [tuple(m.shape[1:]) for m in maps]
        if given != wanted:
            raise ValueError(
                f"the decoder reads maps of shape (C, h, w) {wanted} for an image of "
                f"{size[0]}x{size[1]} pixels, but got {given}. If an adapter that "
                "changes the backbone's maps was attached after build_model, build the "
                "model again; if the maps come from a cache, give the image size they "
                "were made from."
            )
        return grid[0], grid[1]


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, K, h, w) to (B, K, *size); nothing where it fits."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
