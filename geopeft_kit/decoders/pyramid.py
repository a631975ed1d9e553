"""The decoders that read four scales: UNet and UPerNet.

Their bodies are those of segmentation_models_pytorch (MIT), imported when one is
built. Here they get our neck in front and group normalisation inside. Notebook: 07.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from geopeft_kit.decoders.base import Decoder, resize
from geopeft_kit.decoders.neck import Pyramid, group_norm


class PyramidDecoder(Decoder):
    """A decoder on four scales: the neck, a body from a library, a 1x1 convolution.

    Backbones that have four scales already pass the neck unchanged; the single scale of
    a plain ViT becomes a pyramid there.
    """

    reads = (0, 1, 2, 3)

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        self.neck: nn.Module = nn.Identity()
        self.pyramid_channels = list(channels)
        if len(set(strides)) == 1:
            self.neck = Pyramid(channels, strides[0])
            self.pyramid_channels = self.neck.channels

    def decode(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four maps -> (B, K, H', W'), or a little more where the neck padded."""
        patch = self.strides[2]
        pyramid = self.neck(maps)
        # The third map keeps its stride in the neck, so it tells the padded size.
        grid = (pyramid[2].shape[-2] * patch, pyramid[2].shape[-1] * patch)
        logits = self.head(self.dropout(self.fuse(pyramid, grid)))
        return resize(logits, grid)

    def fuse(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four scales -> one map for the head."""
        raise NotImplementedError


class UNetDecoder(PyramidDecoder):
    """A U-Net's way up: enlarge, join the next finer map, convolve twice; four times.

    On a ResNet with random weights this is the from-scratch UNet baseline (without the
    skip at stride 2, which a list of four maps does not carry).

    `width` is the channels of the first block; each following block has half as many.

    Source: Ronneberger et al. 2015, arXiv 1505.04597; module of
    segmentation_models_pytorch (MIT).
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        width: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

        widths = [max(1, width // 2**i) for i in range(4)]
        body = UnetDecoder([0, *self.pyramid_channels], widths, n_blocks=4)
        self.body = with_group_norm(body)
        self.head = nn.Conv2d(widths[-1], outputs, 1)
        self.start()

    def fuse(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four scales -> (B, width/8, H'/2, W'/2) for a first stride of 4."""
        height, width = maps[0].shape[-2:]
        top = (min(2 * height, grid[0]), min(2 * width, grid[1]))
        # The module reads only the size of its first entry: the size to end at.
        return self.body([maps[0].new_empty((1, 0, *top)), *maps])


class UPerNetDecoder(PyramidDecoder):
    """UPerNet: a look at the whole scene (pooling) joined to a feature pyramid.

    `width` is the channels of every scale inside.

    Source: Xiao et al. 2018, arXiv 1807.10221; module of segmentation_models_pytorch
    (MIT).
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        outputs: int,
        width: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, outputs, dropout)
        from segmentation_models_pytorch.decoders.upernet.decoder import (
            UPerNetDecoder as Body,
        )

        body = Body([0, 0, *self.pyramid_channels], 5, decoder_channels=width)
        self.body = with_group_norm(body)
        self.head = nn.Conv2d(width, outputs, 1)
        self.start()

    def fuse(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four scales -> (B, width, h', w') at the finest of them."""
        # The module skips its first two entries (strides 1 and 2).
        return self.body([maps[0], maps[0], *maps])


def with_group_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation in a module by group normalisation."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, group_norm(child.num_features))
        else:
            with_group_norm(child)
    return module
