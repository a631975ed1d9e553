"""Parts of a block that adapters are added to, and how they are added.

Shared by the bottleneck methods and those on the token grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    SwinTransformerBlockV2 as TorchvisionBlockV2,
)

from geopeft_kit.backbones.base import Backbone, TokenGrid
from geopeft_kit.methods.base import Block, BlockMethod
from geopeft_kit.methods.replacement import (
    Places,
    Replacement,
    Replacements,
    trained_in,
)

_POST_NORM = (ResPostBlock, SwinTransformerV2Block, TorchvisionBlockV2)


class AdaptedLayer(nn.Module):
    """A frozen layer and an adapter: layer(x) + adapter(x).

    In series it is y + adapter(y) with y = layer(x).
    """

    def __init__(
        self, layer: nn.Module, adapter: nn.Module, serial: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.adapter, self.serial = layer, adapter, serial

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own shapes; further arguments are handed to the layer."""
        y = self.layer(x, *args, **kwargs)
        return y + self.adapter(y if self.serial else x).to(y.dtype)


def no_mlp(backbone: Backbone) -> str | None:
    """Return which block has no MLP with a norm, or None."""
    for path, block in backbone.blocks:
        if not (hasattr(block, "mlp") and _norm_of(block)):
            return f"its block {path} ({type(block).__name__}) has no norm and mlp"
    return None


def mlp_branch(block: nn.Module) -> tuple[nn.Sequential, list[str]]:
    """The MLP branch of a block as one module: norm, MLP, layer scale, drop path.

    With the branch in the place of `mlp`, and identities in the places of the others
    (their names are returned too), the block computes the same, and `mlp` reads the
    residual stream itself.
    """
    order = [_norm_of(block), "mlp"]
    if norms_behind(block):
        order.reverse()
    order += [name for name in ("ls2", "drop_path2") if hasattr(block, name)]
    branch = nn.Sequential(*(getattr(block, name) for name in order))
    return branch, [name for name in order if name != "mlp"]


def add_to_mlp_branch(
    backbone: Backbone,
    block: Block,
    combine: Callable[[nn.Module], nn.Module],
    tensors: Places,
) -> Replacements:
    """Put `combine(branch)`, which reads the residual stream, in place of `mlp`."""
    model, path = backbone.model, block[0]
    branch, emptied = mlp_branch(block[1])
    substitute = combine(branch)
    return [
        Replacement.at(model, f"{path}.mlp", substitute, tensors),
        *(Replacement.at(model, f"{path}.{name}", nn.Identity()) for name in emptied),
    ]


def beside_mlp_branch(
    backbone: Backbone, block: Block, adapter: nn.Module
) -> Replacements:
    """Let an adapter read what the MLP's norm reads, and add its output."""
    tensors = trained_in(adapter, "adapter")
    combine = functools.partial(AdaptedLayer, adapter=adapter)
    return add_to_mlp_branch(backbone, block, combine, tensors)


def adapted(
    backbone: Backbone,
    path: str,
    layer: nn.Module,
    adapter: nn.Module,
    serial: bool = False,
) -> Replacement:
    """Replace a layer by itself and an adapter."""
    substitute = AdaptedLayer(layer, adapter, serial)
    tensors = trained_in(adapter, "adapter")
    return Replacement.at(backbone.model, path, substitute, tensors)


def norms_behind(block: nn.Module) -> bool:
    """True where the norms follow attention and MLP (Swin V2)."""
    return isinstance(block, _POST_NORM)


def channels_of(block: nn.Module) -> int:
    """Channels of a block's stream."""
    return cast(Tensor, getattr(block, _norm_of(block)).weight).numel()


def channels_first(block: nn.Module) -> bool:
    """True where the MLP is made of 1x1 convolutions and sees (B, C, H, W)."""
    return bool(getattr(block, "use_conv_mlp", False))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Return the layer with zero weight and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm_of(block: nn.Module) -> str:
    """The norm of the MLP: "norm2", in ConvNeXt "norm"; "" where there is none."""
    return next((name for name in ("norm2", "norm") if hasattr(block, name)), "")


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
                "it works beside or behind attention, and the layout "
                f"{backbone.layout!r} has none"
            )
        return no_mlp(backbone)
