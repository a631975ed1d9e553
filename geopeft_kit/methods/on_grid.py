"""What adapters need to convolve over the grid of tokens.

Tokens before the patches (class, registers) have no neighbours: each is a grid of its
own, 1 x 1. Where a patch has several tokens (Galileo's channel groups), each group is a
grid of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone, TokenGrid
from geopeft_kit.methods.base import BlockMethod
from geopeft_kit.methods.block_parts import no_mlp, norms_behind


class OnGrid(nn.Module):
    """A module for maps, applied to tokens; `grid` is the backbone's own object."""

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


class SwinBlock(nn.Module):
    """timm's Swin block; its MLP reads maps, and so does `beside_attention`.

    timm hands the MLP a sequence and the attention shifted windows, in neither of which
    a convolution could see its neighbours.
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


class OnTokenGrids(BlockMethod):
    """What Convpass and Mona need."""

    family = "adapters"
    mergeable = False
    learning_rate = 1e-3  # ours
    needs = "networks with attention (ViT, Swin)"

    def why_not(self, backbone: Backbone) -> str | None:
        if backbone.layout not in ("vit", "swin"):
            return (
                "it stands beside or behind attention, and the layout "
                f"{backbone.layout!r} has none"
            )
        return no_mlp(backbone)
