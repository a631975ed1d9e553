"""The decoders that read the last map alone: linear, FCN, and the one for whole images.

Source: the linear and FCN decoders of the PEFT study, arXiv 2504.17397.
Notebooks: 02 (the linear probe), 07.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from geopeft_kit.decoders.base import Decoder, resize, start_small
from geopeft_kit.decoders.neck import group_norm


class LinearDecoder(Decoder):
    """One transposed convolution: each token paints its own patch of logits.

    The weakest decoder, and so the most honest look at the features. With D channels
    and stride s it trains ``D * s * s * K + K`` weights (98,306 for D=192, s=16, K=2).

    Source: the linear decoder of all main tables in arXiv 2504.17397.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        stride = self.strides[0]
        self.head = nn.ConvTranspose2d(self.channels[0], outputs, stride, stride)
        start_small(self.head)

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) -> (B, K, s*h, s*w); no resizing is needed."""
        return self.head(self.dropout(maps[0]))


class FCNDecoder(Decoder):
    """A few plain upsampling blocks on the last map, then a 1x1 convolution.

    A block is: transposed convolution (x2), 3x3 convolution, normalisation, GELU.

    Args:
        channels: channels of the backbone's four maps.
        strides: their strides, pixels.
        outputs: output channels K.
        width: channels of every block.
        steps: number of blocks; at most log2(stride) are built, the rest of the way to
            pixels is bilinear. The PEFT study used 4 of width 512; 2 of width 256 cost
            a small fraction of the memory.
        dropout: chance of a feature to be zeroed in front of the head.

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
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        steps = min(steps, self.strides[0].bit_length() - 1)
        sizes = [self.channels[0]] + [width] * steps
        blocks = [_fcn_block(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(sizes[-1], outputs, 1)
        start_small(self.head)

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, D, h, w) -> (B, K, H', W')."""
        logits = self.head(self.dropout(self.blocks(maps[0])))
        return resize(logits, grid)


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
    ``D * K + K`` weights.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        self.head = nn.Linear(self.channels[0], outputs)
        start_small(self.head)

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """(B, C, 1, 1) -> logits (B, K); the size does not matter here."""
        given = [tuple(m.shape[1:]) for m in maps]
        if given != [(self.channels[0], 1, 1)]:
            raise ValueError(
                f"the classification head reads one averaged map of shape (C, h, w) "
                f"{(self.channels[0], 1, 1)}, but got {given}. Use model.features, "
                "and build the model after the adapter is attached."
            )
        pooled = self.standardise[0](maps[0]).flatten(1)  # (B, C)
        return self.head(self.dropout(pooled))
