"""Convpass, and what adapters need to convolve over the token grid. Notebook 04.

Attention and MLP have no notion of "next to". A small convolution between the two
linear layers of a bottleneck brings it back, which helps dense maps. Tokens before the
patches (class, registers) have no neighbours: each is a grid of its own, 1 x 1. Where a
patch has several tokens (Galileo's channel groups), each group is a grid of its own.

Source: Jie and Deng 2022, Convolutional Bypasses, arXiv 2207.07039.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from geopeft_kit.backbones.base import TokenGrid
from geopeft_kit.methods.base import (
    Block,
    Method,
    Replacement,
    check_above_zero,
    check_share,
    check_whole,
)
from geopeft_kit.methods.block_parts import (
    channels_of,
    device_of,
    no_mlp,
    norms_behind,
    trained_in,
    zeroed,
)
from geopeft_kit.methods.bottleneck import Parallel

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class OnGrid(nn.Module):
    """A module for maps, applied to tokens.

    Args:
        grid: Where the tokens lie; the backbone's own object.
    """

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid

    def convolve(self, tokens: Tensor) -> Tensor:
        """Maps (B, h, H, W) to maps of the same shape."""
        raise NotImplementedError

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Apply `convolve` to (B, N, h) tokens of a ViT or (B, H, W, h) of a Swin."""
        if tokens.ndim == 4:
            maps = tokens.permute(0, 3, 1, 2)  # (B, h, H, W)
            return self.convolve(maps).permute(0, 2, 3, 1)
        first, maps = self.grid.split(tokens)  # (B, P, h), (B*N, h, H, W)
        if first.shape[1]:
            alone = first.flatten(0, 1)[..., None, None]  # (B*P, h, 1, 1)
            first = self.convolve(alone).view_as(first)
        return self.grid.join(first, self.convolve(maps))


class ConvpassUnit(OnGrid):
    """scale * Up(dropout(act(Conv(act(Down x))))), Up zero at the start.

    The convolution starts as the identity kernel, one of the two starts of the paper's
    code. A count of 2Dh + h + D + k*k*h*h + h.

    Args:
        channels: Channels D of the tokens.
        width: Channels h in the middle.
        kernel_size: Side k of the convolution.
        dropout: Rate before Up.
        scale: Fixed factor on the output.
        grid: Where the tokens lie.
        device: Where the parameters are made.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel_size: int,
        dropout: float,
        scale: float,
        grid: TokenGrid,
        device: torch.device,
    ) -> None:
        super().__init__(grid)
        self.down = nn.Linear(channels, width, device=device)
        self.conv = nn.Conv2d(width, width, kernel_size, padding="same", device=device)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))
        self.up = zeroed(nn.Linear(width, channels, device=device))
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


class SwinBlock(nn.Module):
    """timm's Swin block, with its MLP fed maps, and room beside its attention.

    timm hands the MLP a sequence and the attention shifted windows, in neither of which
    a convolution could see its neighbours.

    Args:
        block: The frozen block.
        beside_attention: Reads what the attention reads, before it is cut into windows.
    """

    def __init__(self, block: Any, beside_attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.beside_attention = beside_attention
        self.norms_behind = norms_behind(block)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), kept."""
        block = self.block
        if self.norms_behind:
            mixed = block.norm1(block._attn(x))
            x = x + block.drop_path1(mixed)
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        normed = block.norm1(x)
        mixed = block._attn(normed)
        if self.beside_attention is not None:
            mixed = mixed + self.beside_attention(normed).to(mixed.dtype)
        x = x + block.drop_path1(mixed)
        return x + block.drop_path2(block.mlp(block.norm2(x)))


class OnTokenGrids(Method):
    """What both need."""

    mergeable = False
    learning_rate = 1e-3  # ours
    needs = "networks with attention (ViT, Swin)"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks without attention."""
        if backbone.layout not in ("vit", "swin"):
            return (
                "it stands beside or behind attention, and the layout "
                f"{backbone.layout!r} has none"
            )
        return no_mlp(backbone)


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
        """Refuse networks without attention, and those that norm behind it."""
        if any(norms_behind(block) for _, block in backbone.blocks):
            return "it reads the normed input, and these blocks norm their output"
        return super().why_not(backbone)

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        width: int = 8,
        kernel_size: int = 3,
        scale: float = 1.0,
        dropout: float = 0.1,
    ) -> list[Replacement]:
        """Put a bypass beside attention and MLP.

        Args:
            backbone: A ViT or Swin.
            blocks: The blocks that get bypasses.
            width: Channels h in the middle.
            kernel_size: Side of the convolution, odd.
            scale: Factor on the bypass.
            dropout: Rate before the last Linear.
        """
        check_whole("width", width)
        check_odd("kernel_size", kernel_size)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        replacements = []
        for path, block in blocks:
            attention, mlp = (
                ConvpassUnit(
                    channels_of(block),
                    width,
                    kernel_size,
                    dropout,
                    scale,
                    backbone.grid,
                    device_of(block),
                )
                for _ in range(2)
            )
            replacements += [
                _beside_attention(backbone, path, block, attention),
                _beside(backbone, f"{path}.mlp", block.mlp, mlp),
            ]
        return replacements


def check_odd(option: str, value: Any) -> int:
    """Return an odd kernel size, or raise with the option's name."""
    check_whole(option, value)
    if value % 2 == 0:
        raise ValueError(f"{option}={value}; it must be odd, to have a centre.")
    return value


def _beside(backbone: Backbone, path: str, layer: Any, unit: nn.Module) -> Replacement:
    tensors = trained_in(unit, "adapter")
    return Replacement.at(backbone.model, path, Parallel(layer, unit), tensors)


def _beside_attention(
    backbone: Backbone, path: str, block: Any, unit: nn.Module
) -> Replacement:
    if backbone.layout != "swin":
        return _beside(backbone, f"{path}.attn", block.attn, unit)
    tensors = trained_in(unit, "beside_attention")
    return Replacement.at(backbone.model, path, SwinBlock(block, unit), tensors)
