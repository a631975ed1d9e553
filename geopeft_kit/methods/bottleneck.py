"""Bottleneck adapters in series and in parallel. Taught in notebook 04.

Each one goes down to a few channels, through a non-linearity, which forbids folding it
into a weight, and up again. The way up starts at zero, so nothing changes at the start.

Source: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv
1902.00751, section 2.1; Chen et al. 2022, AdaptFormer, arXiv 2205.13535, section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import BlockMethod, register
from geopeft_kit.methods.block_parts import (
    adapted,
    beside_mlp_branch,
    channels_first,
    channels_of,
    no_mlp,
    zeroed,
)
from geopeft_kit.methods.checks import check_above_zero, check_share, check_whole
from geopeft_kit.methods.replacement import Replacements


class Bottleneck(nn.Module):
    """scale * Up(dropout(act(Down x))), D -> h -> D channels, Up zero at the start.

    The input is (..., D), or (B, D, H, W) with `channels_first`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        activation: nn.Module,
        dropout: float = 0.0,
        scale: float = 1.0,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.down: Any = nn.Linear(channels, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.up: Any = zeroed(nn.Linear(width, channels))
        self.scale = scale
        self.channel_axis = 1 if channels_first else -1

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape; computes in float32, also on half-precision input."""
        x = x.to(self.down.weight.dtype).movedim(self.channel_axis, -1)
        x = self.scale * self.up(self.dropout(self.activation(self.down(x))))
        return x.movedim(-1, self.channel_axis)


class BottleneckMethod(BlockMethod):
    """What both methods, and quantised bottlenecks, have in common."""

    family = "adapters"
    mergeable = False
    identity_at_start = True
    learning_rate = 1e-3  # ours
    needs = "networks with an MLP in their blocks (ViT, Swin, ConvNeXt)"

    def why_not(self, backbone: Backbone) -> str | None:
        return no_mlp(backbone)


@register
class Houlsby(BottleneckMethod):
    """Bottlenecks in series: behind the attention and behind the MLP of every block.

    y + Up(GELU(Down y)), y being the output of the attention or the MLP, before it is
    added to the stream (and before layer scale, where a network has one). Blocks
    without attention (ConvNeXt) have the one behind the MLP only.

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

    def in_block(
        self, backbone: Backbone, path: str, block: Any, *, width: int = 64
    ) -> Replacements:
        """Put a bottleneck of `width` channels behind the attention and the MLP."""
        check_whole("width", width)
        sizes = channels_of(block), width
        first = channels_first(block)
        return [
            adapted(
                backbone,
                f"{path}.{name}",
                getattr(block, name),
                Bottleneck(*sizes, nn.GELU(), channels_first=first),
                serial=True,
            )
            for name in ("attn", "mlp")
            if hasattr(block, name)
        ]


@register
class AdaptFormer(BottleneckMethod):
    """A bottleneck in parallel to the MLP: x + MLP(LN x) + s * Up(ReLU(Down x)).

    It reads what the MLP's norm reads: the tokens after attention (ViT, Swin), or the
    output of the depthwise convolution (ConvNeXt; ours, as that paper has none). It is
    added outside a ViT's layer scale. ConvNeXt's `gamma` multiplies the whole branch of
    a block, and with it the adapter. In networks that norm behind the MLP (Swin V2) it
    is parallel to MLP and norm, so the formula becomes x + LN(MLP x) + s * Up(...).
    """

    name = "adaptformer"
    title = "AdaptFormer"
    paper = "Chen et al. 2022, AdaptFormer, arXiv 2205.13535"
    trained = "Down and Up beside each MLP"
    count_formula = "2Dh + h + D per block"

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        width: int = 64,
        scale: float = 0.1,
        dropout: float = 0.0,
    ) -> Replacements:
        """Put an adapter beside the MLP and its norm.

        Args:
            width: Channels h in the middle.
            scale: Factor s on the adapter.
            dropout: Rate behind the ReLU; the formula has none.
        """
        check_whole("width", width)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        first = channels_first(block)
        adapter = Bottleneck(
            channels_of(block), width, nn.ReLU(), dropout, scale, first
        )
        return beside_mlp_branch(backbone, (path, block), adapter)
