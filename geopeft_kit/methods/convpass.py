"""Convpass: convolutional bypasses. Taught in notebook 04.

Attention and MLP have no notion of "next to". A small convolution between the two
linear layers of a bottleneck adds it, which helps dense maps.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone, TokenGrid
from geopeft_kit.methods.base import register
from geopeft_kit.methods.block_parts import (
    OnGrid,
    OnTokenGrids,
    SwinBlock,
    adapted,
    channels_of,
    norms_behind,
    zeroed,
)
from geopeft_kit.methods.checks import (
    check_above_zero,
    check_odd,
    check_share,
    check_whole,
)
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in


class ConvpassUnit(OnGrid):
    """scale * Up(dropout(act(Conv(act(Down x))))), Up zero at the start.

    The convolution starts as the identity kernel, one of the two starts of the paper's
    code. It has 2Dh + h + D + k*k*h*h + h numbers, D token channels, h in the middle.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel_size: int,
        dropout: float,
        scale: float,
        grid: TokenGrid,
    ) -> None:
        super().__init__(grid)
        self.down = nn.Linear(channels, width)
        self.conv = nn.Conv2d(width, width, kernel_size, padding="same")
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))
        self.up = zeroed(nn.Linear(width, channels))
        self.activation = QuickGELU()
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def convolve(self, maps: Tensor) -> Tensor:
        """The convolution over (B, h, H, W)."""
        return self.conv(maps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Keeps the shape; computes in float32, also on half-precision input."""
        x = self.activation(self.down(tokens.to(self.down.weight.dtype)))
        x = self.activation(self.on_grid(x))
        return self.scale * self.up(self.dropout(x))


@register
class Convpass(OnTokenGrids):
    """Convolutional bypasses beside the attention and beside the MLP.

    Both read the normed input, like the layers beside them: Linear D -> h, QuickGELU,
    a 3x3 convolution on the token grid, QuickGELU, dropout, Linear h -> D. Where a ViT
    has layer scale, it multiplies the bypass too. On Swin (ours) the bypass of the
    attention sees the whole map, not its windows.
    """

    name = "convpass"
    title = "Convpass"
    paper = "Jie and Deng 2022, Convpass, arXiv 2207.07039"
    trained = "Down, convolution and Up beside attention and MLP"
    count_formula = "2(2Dh + h + D + 9h^2 + h) per block"
    identity_at_start = True
    needs = "networks with attention (ViT, Swin) that norm before it"

    def why_not(self, backbone: Backbone) -> str | None:
        if any(norms_behind(block) for _, block in backbone.blocks):
            return "it reads the normed input, and these blocks norm their output"
        return super().why_not(backbone)

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        width: int = 8,
        kernel_size: int = 3,
        scale: float = 1.0,
        dropout: float = 0.1,
    ) -> Replacements:
        """Put a bypass, times `scale`, beside attention and MLP; h is `width`."""
        check_whole("width", width)
        check_odd("kernel_size", kernel_size)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        sizes = channels_of(block), width, kernel_size
        attention, mlp = (
            ConvpassUnit(*sizes, dropout, scale, backbone.grid) for _ in range(2)
        )
        return [
            _beside_attention(backbone, path, block, attention),
            adapted(backbone, f"{path}.mlp", block.mlp, mlp),
        ]


def _beside_attention(
    backbone: Backbone, path: str, block: Any, unit: nn.Module
) -> Replacement:
    if backbone.layout != "swin":
        return adapted(backbone, f"{path}.attn", block.attn, unit)
    tensors = trained_in(unit, "beside_attention")
    return Replacement.at(backbone.model, path, SwinBlock(block, unit), tensors)
