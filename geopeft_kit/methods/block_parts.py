"""The parts of a block that adapters stand beside: its MLP branch, its channels.

Shared by the bottleneck methods and those on the token grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    SwinTransformerBlockV2 as TorchvisionBlockV2,
)

from geopeft_kit.methods.base import Replacement

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone

Tensors = dict[str, tuple[nn.Module, str]]
"""Readable name -> (module that holds the tensor, its attribute)."""

_POST_NORM = (ResPostBlock, SwinTransformerV2Block, TorchvisionBlockV2)


def no_mlp(backbone: Backbone) -> str | None:
    """Say that a block has no MLP with a norm, or return None."""
    for path, block in backbone.blocks:
        if not (hasattr(block, "mlp") and _norm_of(block)):
            return f"its block {path} ({type(block).__name__}) has no norm and mlp"
    return None


def mlp_branch(block: nn.Module) -> tuple[nn.Sequential, list[str]]:
    """What a block adds to its stream by its MLP, as one module that reads the stream.

    Norm, MLP, layer scale and stochastic depth in the block's order. With this in the
    place of `mlp`, and identities in the places of the others, the block computes what
    it did, and a method can reach the stream itself.

    Returns:
        The branch, and the attributes that have to become identities.
    """
    order = [_norm_of(block), "mlp"]
    if norms_behind(block):
        order.reverse()
    order += [name for name in ("ls2", "drop_path2") if hasattr(block, name)]
    branch = nn.Sequential(*(getattr(block, name) for name in order))
    return branch, [name for name in order if name != "mlp"]


def in_place_of_mlp(
    backbone: Backbone,
    path: str,
    substitute: nn.Module,
    emptied: list[str],
    tensors: Tensors,
) -> list[Replacement]:
    """Put a module that holds the MLP branch in place of `mlp`; empty the rest."""
    model = backbone.model
    return [
        Replacement.at(model, f"{path}.mlp", substitute, tensors),
        *(Replacement.at(model, f"{path}.{name}", nn.Identity()) for name in emptied),
    ]


def norms_behind(block: nn.Module) -> bool:
    """True where the norms stand behind attention and MLP (Swin V2)."""
    return isinstance(block, _POST_NORM)


def channels_of(block: nn.Module) -> int:
    """Channels of a block's stream."""
    return cast(Tensor, getattr(block, _norm_of(block)).weight).numel()


def channels_first(block: nn.Module) -> bool:
    """True where the MLP is made of 1x1 convolutions and sees (B, C, H, W)."""
    return bool(getattr(block, "use_conv_mlp", False))


def device_of(block: nn.Module) -> torch.device:
    """Where a block computes."""
    return next(block.parameters()).device


def trained_in(module: nn.Module, name: str) -> Tensors:
    """Readable name -> (holder, attribute) of all parameters of a new module."""
    places = {}
    for path, _ in module.named_parameters():
        holder, _, attribute = path.rpartition(".")
        places[f"{name}.{path}"] = (module.get_submodule(holder), attribute)
    return places


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Return the layer with zero weight and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm_of(block: nn.Module) -> str:
    """The norm of the MLP: "norm2", in ConvNeXt "norm"; "" where there is none."""
    return next((name for name in ("norm2", "norm") if hasattr(block, name)), "")
