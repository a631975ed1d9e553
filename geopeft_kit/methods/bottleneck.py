"""Bottleneck adapters: a narrow network behind or beside a layer. Notebook 04.

Each one goes down to a few channels, through a non-linearity and up again. Because of
the non-linearity it cannot be folded into a weight; because the way up starts at zero
it changes nothing at the start.

Source: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv
1902.00751, section 2.1; Chen et al. 2022, AdaptFormer, arXiv 2205.13535, section 3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geopeft_kit.methods.base import (
    Block,
    Method,
    Replacement,
    check_above_zero,
    check_share,
    check_whole,
)
from geopeft_kit.methods.block_parts import (
    channels_first,
    channels_of,
    device_of,
    in_place_of_mlp,
    mlp_branch,
    no_mlp,
    trained_in,
    zeroed,
)

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone


class Bottleneck(nn.Module):
    """scale * Up(dropout(act(Down x))), with Up zero at the start.

    Args:
        channels: Channels D of input and output.
        width: Channels h in the middle.
        activation: The non-linearity.
        dropout: Rate on the middle channels.
        scale: Fixed factor on the output.
        channels_first: The input is (B, D, H, W) instead of (..., D).
        device: Where the parameters are made.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        activation: nn.Module,
        dropout: float = 0.0,
        scale: float = 1.0,
        channels_first: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, device=device)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Linear(width, channels, device=device))
        self.scale = scale
        self.channel_axis = 1 if channels_first else -1

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape; computes in float32, also on half-precision input."""
        x = x.to(self.down.weight.dtype).movedim(self.channel_axis, -1)
        x = self.scale * self.up(self.dropout(self.activation(self.down(x))))
        return x.movedim(-1, self.channel_axis)


class Serial(nn.Module):
    """A frozen layer and an adapter behind it: y + adapter(y), y = layer(x)."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own shapes; further arguments are handed to the layer."""
        y = self.layer(x, *args, **kwargs)
        return y + self.adapter(y).to(y.dtype)


class Parallel(nn.Module):
    """A frozen layer and an adapter beside it: layer(x) + adapter(x)."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own shapes; further arguments are handed to the layer."""
        y = self.layer(x, *args, **kwargs)
        return y + self.adapter(x).to(y.dtype)


class _Bottlenecks(Method):
    """What both have in common."""

    mergeable = False
    identity_at_start = True
    learning_rate = 1e-3  # ours
    needs = "networks with an MLP in their blocks (ViT, Swin, ConvNeXt)"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose blocks hold no MLP behind or before a norm."""
        return no_mlp(backbone)


class Houlsby(_Bottlenecks):
    """Bottlenecks in series: behind the attention and behind the MLP of every block.

    y + Up(GELU(Down y)), y being what the attention or the MLP gives, before it is
    added to the stream (and before layer scale, where a network has one). Blocks
    without attention (ConvNeXt) have the one behind the MLP only. Inside Swin's
    windows nothing changes, since every token is treated alone.

    Ours: GELU; Up is exactly zero at the start, where the paper draws small numbers.
    The paper also trains the layer norms; the method `norm` does that.
    """

    name = "houlsby"
    title = "Houlsby adapter"
    paper = (
        "Houlsby et al. 2019, Parameter-Efficient Transfer Learning, arXiv 1902.00751"
    )
    trained = "Down and Up behind attention and MLP"
    count_formula = "2(2Dh + h + D) per block; half without attention"

    def build(
        self, backbone: Backbone, blocks: list[Block], *, width: int = 64
    ) -> list[Replacement]:
        """Put an adapter behind the attention and the MLP.

        Args:
            backbone: The backbone.
            blocks: The blocks that get adapters.
            width: Channels h in the middle.
        """
        check_whole("width", width)
        replacements = []
        for path, block in blocks:
            for name in ("attn", "mlp"):
                if not hasattr(block, name):
                    continue
                adapter = Bottleneck(
                    channels_of(block),
                    width,
                    nn.GELU(),
                    channels_first=channels_first(block),
                    device=device_of(block),
                )
                serial = Serial(getattr(block, name), adapter)
                tensors = trained_in(adapter, "adapter")
                replacements.append(
                    Replacement.at(backbone.model, f"{path}.{name}", serial, tensors)
                )
        return replacements


class AdaptFormer(_Bottlenecks):
    """A bottleneck beside the MLP: x + MLP(LN x) + s * Up(ReLU(Down x)).

    It reads what the MLP's norm reads: the tokens after attention (ViT, Swin), or the
    output of the depthwise convolution (ConvNeXt; ours, as that paper has none). It is
    added outside a ViT's layer scale. ConvNeXt's `gamma` multiplies the whole branch of
    a block, and with it the adapter. In networks that norm behind the MLP (Swin V2) it
    stands beside MLP and norm, so the formula becomes x + LN(MLP x) + s * Up(...).
    """

    name = "adaptformer"
    title = "AdaptFormer"
    paper = "Chen et al. 2022, AdaptFormer, arXiv 2205.13535"
    trained = "Down and Up beside each MLP"
    count_formula = "2Dh + h + D per block"

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        width: int = 64,
        scale: float = 0.1,
        dropout: float = 0.0,
    ) -> list[Replacement]:
        """Put an adapter beside the MLP and its norm.

        Args:
            backbone: The backbone.
            blocks: The blocks that get adapters.
            width: Channels h in the middle.
            scale: Factor s on the adapter.
            dropout: Rate behind the ReLU; the formula has none.
        """
        check_whole("width", width)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        replacements = []
        for path, block in blocks:
            adapter = Bottleneck(
                channels_of(block),
                width,
                nn.ReLU(),
                dropout,
                scale,
                channels_first(block),
                device_of(block),
            )
            branch, emptied = mlp_branch(block)
            tensors = trained_in(adapter, "adapter")
            parallel = Parallel(branch, adapter)
            replacements += in_place_of_mlp(backbone, path, parallel, emptied, tensors)
        return replacements
