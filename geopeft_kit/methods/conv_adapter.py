"""Conv-Adapter: a small convolution beside each spatial one. Taught in notebook 04."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import BlockMethod, register
from geopeft_kit.methods.block_parts import adapted
from geopeft_kit.methods.checks import check_odd, check_whole
from geopeft_kit.methods.replacement import Replacements


class ConvAdapterUnit(nn.Module):
    """gain * Pointwise(GELU(Spatial x)): C -> w = C / g channels in w groups -> C_out.

    g is the reduction; kernel size, stride and dilation are those of Spatial.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        reduction: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        width = inputs // reduction
        self.spatial = nn.Conv2d(
            inputs,
            width,
            kernel_size,
            stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=width,
        )
        self.activation = nn.GELU()
        self.pointwise = nn.Conv2d(width, outputs, 1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H / stride, W / stride), in float32."""
        x = self.spatial(x.to(self.spatial.weight.dtype))
        return self.gain * self.pointwise(self.activation(x))


@register
class ConvAdapter(BlockMethod):
    """A grouped and a 1x1 convolution beside each spatial convolution of a block.

    In ConvNeXt that is the depthwise 7x7, in a ResNet every 3x3 (ours: the sheet this
    was written from describes ConvNeXt); kernel, stride and dilation are those of the
    convolution beside it. The paper's code also adapts down-samplings between stages,
    which is left out. All start as plain convolutions do and the gain at 1, so that the
    untrained adapter **changes** the output.
    """

    name = "conv_adapter"
    title = "Conv-Adapter"
    family = "adapters"
    paper = "Chen et al. 2024, Conv-Adapter, arXiv 2208.07463"
    trained = "grouped and 1x1 convolution and a gain beside each spatial convolution"
    count_formula = "C k^2 + w + wC + 2C per convolution, w = C/g"
    mergeable = False
    identity_at_start = False
    learning_rate = 1e-3  # the paper's code: AdamW, 1e-3
    needs = "convolutional networks (ConvNeXt, ResNet)"

    def why_not(self, backbone: Backbone) -> str | None:
        if all(spatial_convolutions(block) for _, block in backbone.blocks):
            return None
        return f"the blocks of the layout {backbone.layout!r} hold no k x k convolution"

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        reduction: int = 8,
        kernel_size: int | None = None,
    ) -> Replacements:
        """Put an adapter beside each spatial convolution.

        `reduction` is g, a divisor of all channel counts; `kernel_size` is that of the
        grouped convolution, odd, or None for that of the convolution beside it.
        """
        check_whole("reduction", reduction)
        if kernel_size is not None:
            check_odd("kernel_size", kernel_size)
        replacements = []
        for name, conv in spatial_convolutions(block).items():
            _check_divides(reduction, conv.in_channels, f"{path}.{name}")
            unit = ConvAdapterUnit(
                conv.in_channels,
                conv.out_channels,
                reduction,
                kernel_size or conv.kernel_size[0],
                conv.stride[0],
                conv.dilation[0],
            )
            replacements.append(adapted(backbone, f"{path}.{name}", conv, unit))
        return replacements


def spatial_convolutions(block: nn.Module) -> dict[str, nn.Conv2d]:
    """The block's own convolutions that see more than one pixel, by attribute."""
    return {
        name: layer
        for name, layer in block.named_children()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1
    }


def _check_divides(reduction: int, channels: int, path: str) -> None:
    if channels % reduction:
        fitting = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ValueError(
            f"reduction={reduction} does not divide the {channels} channels of {path}; "
            f"it can be one of {fitting}."
        )
