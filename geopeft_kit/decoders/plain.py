"""The decoders that need the last map alone: linear, FCN, and the one for whole images.

With ``all_scales`` they read all four maps, each at its own stride; `build_model` sets
it for an adapter that makes four scales (ViT-Adapter), so that none is thrown away.

Source: the linear and FCN decoders of the PEFT study, arXiv 2504.17397.
Notebooks: 02 (the linear probe), 07.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.decoders.base import Decoder, resize
from geopeft_kit.decoders.neck import group_norm


class PatchTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose patches do not overlap: kernel and stride agree.

    On a CPU PyTorch takes oneDNN, whose forward took 3 to 25 times as long as PyTorch's
    own kernel (one x86-64 core, maps of 5 x 9 to 32 x 32, width 64 to 768, stride 4 to
    16). The bits were the same, except the last ones at width 768.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, D, h, w) -> (B, K, s*h, s*w)."""
        plain = x.is_cpu and not torch.is_autocast_enabled("cpu")
        if not (self.training and plain) or output_size is not None:
            return super().forward(x, output_size)
        painted: Tensor = torch.ops.aten.slow_conv_transpose2d(
            x, self.weight, self.kernel_size, self.bias, self.stride
        )
        return painted


class LinearDecoder(Decoder):
    """One transposed convolution: each token paints its own patch of logits.

    The weakest decoder, and so the most honest look at the features. With D channels
    and stride s it trains ``D * s * s * K + K`` weights (98,306 for D=192, s=16, K=2).
    With `all_scales` each map paints its own patches and the paintings add up: still
    one linear map, with ``D_i * s_i * s_i * K`` weights more for each finer map.

    Source: the linear decoder of all main tables in arXiv 2504.17397; `all_scales` is
    ours.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
        all_scales: bool = False,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout, all_scales)
        stride = self.strides[-1]
        self.head = PatchTranspose2d(self.channels[-1], outputs, stride, stride)
        self.finer = nn.ModuleList(
            PatchTranspose2d(c, outputs, s, s, bias=False)
            for c, s in zip(self.channels[:-1], self.strides[:-1], strict=True)
        )
        self.start()

    @property
    def last_layers(self) -> list[Any]:
        """The head and its like on the finer maps."""
        return [self.head, *self.finer]

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) -> (B, K, s*h, s*w); no resizing is needed."""
        logits = self.head(self.dropout(maps[-1]))
        for layer, finer in zip(self.finer, maps, strict=False):
            logits = logits + layer(self.dropout(finer))
        return logits


class FCNDecoder(Decoder):
    """A few plain upsampling blocks on the last map, then a 1x1 convolution.

    A block is: transposed convolution (x2), 3x3 convolution, normalisation, GELU. With
    `all_scales` each finer map is added by a 1x1 convolution where its stride is
    reached, as in the paper's skips, and there are enough blocks to reach them all.

    `width` is the channels of a block. Of `steps` blocks at most log2(stride) are
    built; the rest of the way to pixels is bilinear. The PEFT study used 4 of width
    512; 2 of width 256 cost a small fraction of the memory.

    Source: after FCN (Long et al. 2015, arXiv 1411.4038), in the form of the PEFT study
    (arXiv 2504.17397).
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        width: int = 256,
        steps: int = 2,
        dropout: float = 0.0,
        all_scales: bool = False,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout, all_scales)
        halvings = [(self.strides[-1] // s).bit_length() - 1 for s in self.strides]
        steps = min(max(steps, *halvings, 0), self.strides[-1].bit_length() - 1)
        sizes = [self.channels[-1]] + [width] * steps
        # The number of blocks after which each finer map has the same stride.
        self.joins = halvings[:-1]
        self.skips = nn.ModuleList(
            nn.Conv2d(c, sizes[n], 1)
            for c, n in zip(self.channels[:-1], self.joins, strict=True)
        )
        blocks = [_fcn_block(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(sizes[-1], outputs, 1)
        self.start()

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) -> (B, K, H', W')."""
        features = self._joined(maps[-1], maps, 0)
        for number, block in enumerate(self.blocks, start=1):
            features = self._joined(block(features), maps, number)
        return resize(self.head(self.dropout(features)), grid)

    def _joined(self, features: Tensor, maps: list[Tensor], blocks: int) -> Tensor:
        """The features with the finer maps that join after so many blocks."""
        for skip, finer, join in zip(self.skips, maps, self.joins, strict=False):
            if join == blocks:
                features = features + skip(finer)
        return features


def _fcn_block(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, width, 2, stride=2),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        group_norm(width),
        nn.GELU(),
    )


class ClassificationDecoder(Decoder):
    """Mean over all places of the last map, standardise, one linear layer.

    Takes maps that are averaged already ((B, C, 1, 1), see `Model.features`). Trains
    ``D * K + K`` weights; with `all_scales` it reads the means of all four maps side by
    side, and D is the sum of their channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
        all_scales: bool = False,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout, all_scales)
        self.head = nn.Linear(sum(self.channels), outputs)
        self.start()

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """Means (B, C_i, 1, 1) -> logits (B, K); the size does not matter here."""
        given = [tuple(m.shape[1:]) for m in maps]
        wanted = [(c, 1, 1) for c in self.channels]
        if given != wanted:
            raise ValueError(
                f"the classification head reads averaged maps of shape (C, h, w) "
                f"{wanted}, but got {given}. Use model.features, and build the model "
                "after the adapter is attached."
            )
        ready = [s(m) for s, m in zip(self.standardise, maps, strict=True)]
        pooled = torch.cat(ready, dim=1).flatten(1)  # (B, C)
        return self.head(self.dropout(pooled))
