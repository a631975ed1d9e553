"""Adapters with 1, 2, 4 or 8 bits per weight, stored packed. Taught in notebook 06.

Source: Jie, Wang and Deng 2023 (ICCV), Revisiting the Parameter Efficiency of Adapters
from the Perspective of Precision Redundancy, arXiv 2307.16867; Bi-AdaptFormer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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
)
from geopeft_kit.methods.bottleneck import Parallel
from geopeft_kit.methods.codebook import (
    FULL_BITS,
    QUANTISED_BITS,
    check_bits,
    levels_for_normal,
    pack,
    thresholds_between,
    unpack,
)

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone
    from geopeft_kit.methods.adapter import Adapter

_EPSILON = 1e-5  # of the standardisation, as in the paper's code


class QuantisedLinear(nn.Module):
    """Q-Linear: a linear layer without bias whose weights take 2^b values.

    What trains is a full-precision ("latent") weight w. The layer computes with

        n = (w - mean) / (std + 1e-5),   w_b = level nearest to n * std + mean,

    mean and unbiased std being those of all entries of w. Gradients pass through the
    rounding as if it were not there (straight-through), and through mean and std.

    A file holds a code per weight, mean and std, from which the outputs come back
    exactly. A loaded layer takes level * (std + 1e-5) + mean as its latent weight. The
    mean and std of *that* are a little different, so it remembers both pairs in
    `anchor` and works with stored + (own - own at loading): the stored ones as long as
    the weight stays, and trainable as before when it does not. The anchor is ours.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        bits: 1, 2, 4, 8, or 32 for an ordinary linear layer without bias.
        device: Where the parameters are made.
    """

    levels: Tensor
    thresholds: Tensor
    anchor: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bits: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits("bits", bits, (*QUANTISED_BITS, FULL_BITS))
        start = nn.Linear(inputs, outputs, bias=False, device=device)
        self.weight = start.weight
        if bits == FULL_BITS:
            return
        levels = torch.tensor(levels_for_normal(bits), device=device)  # (2^b,)
        self.register_buffer("levels", levels, persistent=False)
        thresholds = thresholds_between(levels)
        self.register_buffer("thresholds", thresholds, persistent=False)
        # Rows: as stored, and own at loading; columns: mean, std.
        self.register_buffer("anchor", torch.zeros(2, 2, device=device))

    @property
    def quantised(self) -> bool:
        """False for 32 bits."""
        return self.bits != FULL_BITS

    def statistics(self) -> Tensor:
        """Mean and std that the layer works with, (2,)."""
        stored, at_loading = self.anchor
        return stored + (_statistics(self.weight) - at_loading)

    def quantised_weight(self) -> Tensor:
        """The weight that the layer computes with, (outputs, inputs)."""
        if not self.quantised:
            return self.weight
        mean, std = self.statistics()
        exact = (self.weight - mean) / (std + _EPSILON)
        level = self.levels[self._nearest(exact)]
        # The bracket is zero, and carries the gradient past the rounding.
        return (level + (exact - exact.detach())) * std + mean

    def codes(self) -> Tensor:
        """Number of the level nearest to each weight, (outputs, inputs) int64."""
        mean, std = self.statistics().detach()
        return self._nearest((self.weight - mean) / (std + _EPSILON))

    def _nearest(self, standardised: Tensor) -> Tensor:
        return torch.bucketize(standardised.detach(), self.thresholds)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.quantised_weight().to(x.dtype))

    def packed(self) -> dict[str, Tensor]:
        """What a file holds: `codes` (uint8) and `mean_std` (2 float32)."""
        codes = pack(self.codes(), self.bits)
        return {"codes": codes, "mean_std": self.statistics().detach()}

    def load_packed(self, codes: Tensor, mean_std: Tensor) -> None:
        """Take over what `packed` gave."""
        with torch.no_grad():
            mean, std = mean_std = mean_std.to(self.weight)
            numbers = unpack(
                codes.to(self.weight.device), self.bits, self.weight.numel()
            )
            latent = self.levels[numbers] * (std + _EPSILON) + mean
            self.weight.copy_(latent.view_as(self.weight))
            self.anchor.copy_(torch.stack([mean_std, _statistics(self.weight)]))

    def extra_repr(self) -> str:
        """Shape and bits, as `print` shows them."""
        outputs, inputs = self.weight.shape
        return f"{inputs} -> {outputs}, bits={self.bits}"


class QuantisedBottleneck(nn.Module):
    """s * Up(dropout(ReLU(Down x))) of two `QuantisedLinear`.

    Up starts at small random numbers, because zeros cannot be standardised; at 32 bits
    it starts at zero.

    Args:
        channels: Channels D of input and output.
        width: Channels h in the middle.
        bits: Bits per weight.
        scale: Fixed factor s on the output.
        dropout: Rate on the middle channels.
        channels_first: The input is (B, D, H, W) instead of (..., D).
        device: Where the parameters are made.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bits: int,
        scale: float,
        dropout: float,
        channels_first: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.down = QuantisedLinear(channels, width, bits, device)
        self.dropout = nn.Dropout(dropout)
        self.up = start_small(QuantisedLinear(width, channels, bits, device))
        self.scale = scale
        self.channel_axis = 1 if channels_first else -1

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape; computes in float32, also on half-precision input."""
        x = x.to(self.down.weight.dtype).movedim(self.channel_axis, -1)
        x = self.scale * self.up(self.dropout(F.relu(self.down(x))))
        return x.movedim(-1, self.channel_axis)


class QuantisedMethod(Method):
    """What methods with quantised layers share: they are stored packed."""

    mergeable = False
    identity_at_start = False
    learning_rate = 1e-3  # the paper's, for Bi-AdaptFormer

    def starts_as_identity(self, config: Mapping[str, object]) -> bool:
        """Only at 32 bits, where the way up can start at zero."""
        return config["bits"] == FULL_BITS

    def packed(self, adapter: Adapter) -> dict[str, Tensor]:
        """Codes, mean and std in the place of each quantised weight."""
        stored = adapter.tensors()
        for name, layer in _quantised_layers(adapter):
            del stored[name]
            stored |= {f"{name}.{key}": t for key, t in layer.packed().items()}
        return stored

    def unpack(self, adapter: Adapter, stored: Mapping[str, Tensor]) -> None:
        """Fill the quantised layers from their codes, the rest as it is."""
        layers = dict(_quantised_layers(adapter))
        for name, tensor in adapter.tensors().items():
            if name in layers:
                codes, mean_std = stored[f"{name}.codes"], stored[f"{name}.mean_std"]
                layers[name].load_packed(codes, mean_std)
            else:
                tensor.copy_(stored[name])


class QuantisedAdapter(QuantisedMethod):
    """Bi-AdaptFormer: x + MLP(LN x) + s * Up(dropout(ReLU(Down x))), without biases.

    It stands where `adaptformer` stands and reads the same: the un-normalised stream in
    front of the MLP's norm (ViT, Swin), or the output of the depthwise convolution
    (ConvNeXt, where the block's `gamma` multiplies it too; ours, as that paper has
    none). Stored: ceil(b D h / 8) + 8 bytes per layer.

    Up starts from a normal distribution with std 1e-3, cut at 2e-3, so the adapter is
    *no* identity at the start, unless `bits` is 32. The paper tunes s for every task;
    our default is 1. Down starts as torch's `nn.Linear` does (ours).
    """

    name = "quantised_adapter"
    title = "Quantised adapter (Bi-AdaptFormer)"
    paper = "Jie et al. 2023, Precision Redundancy of Adapters, arXiv 2307.16867"
    trained = "Down and Up beside each MLP, b bits a weight"
    count_formula = "2Dh per block; ceil(2bDh/8) + 16 bytes"
    needs = "networks with an MLP in their blocks (ViT, Swin, ConvNeXt)"

    def why_not(self, backbone: Backbone) -> str | None:
        """Refuse networks whose blocks hold no MLP behind or before a norm."""
        return no_mlp(backbone)

    def build(
        self,
        backbone: Backbone,
        blocks: list[Block],
        *,
        width: int = 32,
        bits: int = 1,
        scale: float = 1.0,
        dropout: float = 0.1,
    ) -> list[Replacement]:
        """Put a quantised adapter beside the MLP and its norm.

        Args:
            backbone: The backbone.
            blocks: The blocks that get adapters.
            width: Channels h in the middle.
            bits: Bits per weight: 1, 2, 4, 8, or 32 for none saved.
            scale: Factor s on the adapter.
            dropout: Rate behind the ReLU.
        """
        check_whole("width", width)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        replacements = []
        for path, block in blocks:
            adapter = QuantisedBottleneck(
                channels_of(block),
                width,
                bits,
                scale,
                dropout,
                channels_first(block),
                device_of(block),
            )
            branch, emptied = mlp_branch(block)
            tensors = trained_in(adapter, "adapter")
            parallel = Parallel(branch, adapter)
            replacements += in_place_of_mlp(backbone, path, parallel, emptied, tensors)
        return replacements


def start_small(layer: QuantisedLinear) -> QuantisedLinear:
    """Give a layer a start near zero: exactly zero only where it is not quantised."""
    if layer.quantised:
        nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
    else:
        nn.init.zeros_(layer.weight)
    return layer


def _statistics(weight: Tensor) -> Tensor:
    """Mean and unbiased standard deviation over all entries, (2,)."""
    return torch.stack([weight.mean(), weight.std()])


def _quantised_layers(adapter: Adapter) -> Iterator[tuple[str, QuantisedLinear]]:
    """Yield (name of the weight, layer) of every layer that is stored as codes."""
    for name, holder in adapter.holders():
        if isinstance(holder, QuantisedLinear) and holder.quantised:
            yield name, holder
