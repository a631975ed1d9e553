"""Mona: a bottleneck with convolutions of three sizes, in series.

Taught in notebook 04. Source: Yin et al. 2025, Mona, arXiv 2408.08345 (CVPR 2025).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone, TokenGrid
from geopeft_kit.methods.base import register
from geopeft_kit.methods.block_parts import (
    OnGrid,
    OnTokenGrids,
    SwinBlock,
    add_to_mlp_branch,
    channels_of,
)
from geopeft_kit.methods.checks import check_share, check_whole
from geopeft_kit.methods.replacement import Replacement, Replacements, trained_in


class MonaUnit(OnGrid):
    """Mona without its outer skip, so that a block's own sum can be that skip.

    Input gains on the normed and the raw tokens, Linear, the mean of three depthwise
    convolutions with skip, a 1x1 convolution with skip, GELU, dropout, Linear.
    """

    def __init__(
        self, channels: int, width: int, dropout: float, grid: TokenGrid
    ) -> None:
        super().__init__(grid)
        self.norm = nn.LayerNorm(channels)
        self.normed_gain = nn.Parameter(torch.full((channels,), 1e-6))
        self.raw_gain = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, width)
        self.narrow, self.middle, self.wide = (
            nn.Conv2d(width, width, size, padding="same", groups=width)
            for size in (3, 5, 7)
        )
        self.mix = nn.Conv2d(width, width, 1)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, channels)

    def convolve(self, maps: Tensor) -> Tensor:
        """Three depthwise convolutions and the 1x1 one, over (B, h, H, W)."""
        maps = maps + (self.narrow(maps) + self.middle(maps) + self.wide(maps)) / 3
        return maps + self.mix(maps)

    def forward(self, tokens: Tensor) -> Tensor:
        """What is added to the tokens; shapes as there, computed in float32."""
        x = tokens.to(self.down.weight.dtype)
        x = self.norm(x) * self.normed_gain + x * self.raw_gain
        x = self.on_grid(self.down(x))
        return self.up(self.dropout(self.activation(x)))


class MonaMlp(nn.Module):
    """The MLP branch of a block, one Mona before it and one behind it.

    The block adds its input x to the result. With a, b for what the two units add,
    x + a is the input of the branch, and the block gives x + a + branch + b.
    """

    def __init__(
        self, branch: nn.Module, after_attention: nn.Module, after_mlp: nn.Module
    ) -> None:
        super().__init__()
        self.branch = branch
        self.after_attention = after_attention
        self.after_mlp = after_mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) or (B, H, W, C), kept."""
        added = self.after_attention(x).to(x.dtype)
        added = added + self.branch(x + added)
        return added + self.after_mlp(x + added).to(x.dtype)


@register
class Mona(OnTokenGrids):
    """Multi-cognitive adapters in series: after the attention and after the MLP.

    Each acts on the stream, after the block's sum: x + Up(dropout(GELU(f(Down x')))),
    f three depthwise convolutions (3, 5, 7) and a 1x1 one, x' the gained input. Layer
    scale does not touch it. Up starts as any Linear does, so that the untrained adapter
    **changes** the output. Two per Swin block are the paper's; ViTs are ours.
    """

    name = "mona"
    title = "Mona"
    paper = "Yin et al. 2025, Mona, arXiv 2408.08345"
    trained = "norm, gains, Down, four convolutions and Up, twice a block"
    count_formula = "2(5C + 2Ch + h^2 + 88h) per block"
    identity_at_start = False

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        width: int = 64,
        dropout: float = 0.1,
    ) -> Replacements:
        """Put an adapter of `width` channels behind each of a block's two sums."""
        check_whole("width", width)
        check_share("dropout", dropout)
        first, second = (
            MonaUnit(channels_of(block), width, dropout, backbone.grid)
            for _ in range(2)
        )
        tensors = trained_in(first, "after_attention")
        tensors |= trained_in(second, "after_mlp")
        combine = functools.partial(MonaMlp, after_attention=first, after_mlp=second)
        entries = add_to_mlp_branch(backbone, (path, block), combine, tensors)
        if backbone.layout == "swin":
            return [Replacement.at(backbone.model, path, SwinBlock(block)), *entries]
        return entries
