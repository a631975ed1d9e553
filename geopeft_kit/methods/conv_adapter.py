"""Conv-Adapter: a small convolution beside each spatial one. Taught in notebook 04.

Source: Chen et al. 2024, Conv-Adapter, arXiv 2208.07463 (CVPR workshops 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geopeft_kit.methods.base import Block, Method, Replacement, check_whole
from geopeft_kit.methods.bottleneck import Parallel, trained_in
from geopeft_kit.methods.convolutional import check_odd

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class ConvAdapterUnit(nn.Module):
    """gain * Pointwise(GELU(Spatial x)): C -> w channels in w groups, w -> C_out.

    Args:
        inputs: Channels C that come in.
        outputs: Channels that go out.
        reduction: g; the middle has w = C / g channels.
        kernel_size: Side k of the grouped convolution.
        stride: Its stride.
        dilation: Its dilation.
        device: Where the parameters are made.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        reduction: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        device: torch.device | None = None,
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
            device=device,
        )
        self.activation = nn.GELU()
        self.pointwise = nn.Conv2d(width, outputs, 1, device=device)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, H / stride, W / stride), in float32."""
        x = self.spatial(x.to(self.spatial.weight.dtype))
        return self.gain * self.pointwise(self.activation(x))


class ConvAdapter(Method):
    """A grouped and a 1x1 convolution beside each spatial convolution of a block.

    In ConvNeXt that is the depthwise 7x7, in a ResNet every 3x3 (ours: the sheet this
    was written from describes ConvNeXt); kernel, stride and dilation are those of the
    convolution beside it. The paper's code also adapts down-samplings between stages,
    which is left out. All start as plain convolutions do and the gain at 1, so that the
    untrained adapter **changes** the output.
    """

    name = "conv_adapter"
    title = "Conv-Adapter"
    paper = "Chen et al. 2024, Conv-Adapter, arXiv 2208.07463"
    trained = "grouped and 1x1 convolution and a gain beside each spatial convolution"
    count_formula = "C k^2 + w + wC + 2C per convolution, w = C/g"
    mergeable = False
    identity_at_start = False
    learning_rate = 1e-3  # the paper's code: AdamW, 1e-3
    needs = "convolutional networks (ConvNeXt, ResNet)"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose blocks have no spatial convolution."""
        if all(spatial_convolutions(block) for _, block in backbone.blocks):
            return None
        return f"the blocks of the layout {backbone.layout!r} hold no k x k convolution"

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        reduction: int = 8,
        kernel_size: int | None = None,
    ) -> list[Replacement]:
        """Put an adapter beside each spatial convolution.

        Args:
            backbone: A ConvNeXt or ResNet.
            blocks: The blocks that get adapters.
            reduction: g; a divisor of all channel counts.
            kernel_size: Side of the grouped convolution, odd; None for that of the
                convolution beside it.
        """
        check_whole("reduction", reduction)
        if kernel_size is not None:
            check_odd("kernel_size", kernel_size)
        replacements = []
        for path, block in blocks:
            for name, conv in spatial_convolutions(block).items():
                _check_divides(reduction, conv.in_channels, f"{path}.{name}")
                unit = ConvAdapterUnit(
                    conv.in_channels,
                    conv.out_channels,
                    reduction,
                    kernel_size or conv.kernel_size[0],
                    conv.stride[0],
                    conv.dilation[0],
                    conv.weight.device,
                )
                parallel, tensors = Parallel(conv, unit), trained_in(unit, "adapter")
                replacements.append(
                    Replacement.at(backbone.model, f"{path}.{name}", parallel, tensors)
                )
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
