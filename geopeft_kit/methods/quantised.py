"""Adapters with 1, 2, 4 or 8 bits per weight, stored packed. Taught in notebook 06.

A weight is one of 2^b levels, which are fixed, made once for numbers from N(0, 1); a
layer brings its weights to that scale and back.

Source: Jie, Wang and Deng 2023 (ICCV), Revisiting the Parameter Efficiency of Adapters
from the Perspective of Precision Redundancy, arXiv 2307.16867.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.special import ndtr, ndtri

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.methods.base import Method, register
from geopeft_kit.methods.block_parts import (
    beside_mlp_branch,
    channels_first,
    channels_of,
)
from geopeft_kit.methods.bottleneck import Bottleneck, BottleneckMethod
from geopeft_kit.methods.checks import (
    check_above_zero,
    check_choice,
    check_share,
    check_whole,
)
from geopeft_kit.methods.replacement import Replacements, tensors_of

QUANTISED_BITS = (1, 2, 4, 8)
FULL_BITS = 32
_SQRT_2_PI = (2 * torch.pi) ** 0.5


@functools.cache
def levels_for_normal(bits: int) -> tuple[float, ...]:
    """Return the 2^b levels with the smallest expected absolute error on N(0, 1).

    A cell ends half-way between two levels, t_j = (v_j + v_(j+1)) / 2, and each level
    is the *median* of its cell: 2 Phi(v_j) = Phi(t_(j-1)) + Phi(t_j). The paper's code
    updates both in turn, 500 times, which at 8 bits is far from the solution (outermost
    level 2.81, here 3.79). Ours starts from N(0, 2), the best density for many levels,
    and ends with Newton's method.
    """
    count = 2**bits
    places = torch.arange(count, dtype=torch.float64, device="cpu").add(0.5) / count
    levels = 2**0.5 * ndtri(places)  # (K,)
    for _ in range(10):
        levels = ndtri(_middle_shares(levels))
    for _ in range(8):
        excess = 2 * (ndtr(levels) - _middle_shares(levels))
        slope = F.pad(_density(thresholds_between(levels)), (1, 1)) / 2  # (K + 1,)
        jacobian = torch.diag(2 * _density(levels) - slope[1:] - slope[:-1])
        jacobian -= torch.diag(slope[1:-1], 1) + torch.diag(slope[1:-1], -1)
        levels = levels - torch.linalg.solve(jacobian, excess)
    levels = (levels - levels.flip(0)) / 2  # symmetric to the last digit
    return tuple(levels.tolist())


def thresholds_between(levels: Tensor) -> Tensor:
    """Return where the nearest level changes: half-way between neighbours, (K - 1,)."""
    return (levels[1:] + levels[:-1]) / 2


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put n codes of b bits into (ceil(n b / 8),) uint8, the first in the low bits."""
    each = 8 // bits
    flat = F.pad(codes.flatten(), (0, -codes.numel() % each))
    shifts = torch.arange(each, device=codes.device) * bits
    shifted = flat.unflatten(0, (-1, each)) << shifts  # (bytes, 8 / b)
    return shifted.sum(dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Take n = `count` codes out of bytes, (n,) int64: the opposite of `pack`."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    codes = (packed.long()[:, None] >> shifts) & (2**bits - 1)  # (bytes, 8 / b)
    return codes.flatten()[:count]


def _middle_shares(levels: Tensor) -> Tensor:
    """Share of N(0, 1) below the median of each level's cell, (K,)."""
    shares = F.pad(ndtr(thresholds_between(levels)), (1, 1))  # (K + 1,)
    shares[-1] = 1
    return (shares[1:] + shares[:-1]) / 2


def _density(numbers: Tensor) -> Tensor:
    """Density of N(0, 1)."""
    return torch.exp(-numbers.square() / 2) / _SQRT_2_PI


_EPSILON = 1e-5  # of the standardisation, as in the paper's code


class QuantisedLinear(nn.Module):
    """Q-Linear: a linear layer without bias whose weights take 2^b values.

    A full-precision ("latent") weight w trains. The layer computes with

        n = (w - mean) / (std + 1e-5),   w_b = level nearest to n * std + mean,

    mean and unbiased std over all entries. Gradients pass the rounding unchanged
    (straight-through). With 32 bits it is an ordinary linear layer.

    A file holds a code per weight, mean and std. A loaded layer takes level * (std +
    1e-5) + mean as its latent weight, whose own mean and std differ a little. So
    `anchor` (ours) keeps both pairs, and the layer works with stored + (own - own at
    loading): exact until the weight changes, and trainable.
    """

    levels: Tensor
    thresholds: Tensor
    anchor: Tensor

    def __init__(self, inputs: int, outputs: int, bits: int) -> None:
        super().__init__()
        self.bits = check_choice("bits", bits, (*QUANTISED_BITS, FULL_BITS))
        self.weight = nn.Linear(inputs, outputs, bias=False).weight
        if bits == FULL_BITS:
            return
        levels = torch.tensor(levels_for_normal(bits))  # (2^b,)
        self.register_buffer("levels", levels, persistent=False)
        thresholds = thresholds_between(levels)
        self.register_buffer("thresholds", thresholds, persistent=False)
        # Rows: as stored, and own at loading; columns: mean, std.
        self.register_buffer("anchor", torch.zeros(2, 2))

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
            codes = codes.to(self.weight.device)
            numbers = unpack(codes, self.bits, self.weight.numel())
            latent = self.levels[numbers] * (std + _EPSILON) + mean
            self.weight.copy_(latent.view_as(self.weight))
            self.anchor.copy_(torch.stack([mean_std, _statistics(self.weight)]))

    def extra_repr(self) -> str:
        """Shape and bits, as `print` shows them."""
        outputs, inputs = self.weight.shape
        return f"{inputs} -> {outputs}, bits={self.bits}"


class QuantisedBottleneck(Bottleneck):
    """s * Up(dropout(ReLU(Down x))) of two `QuantisedLinear`, D -> h -> D channels.

    Up starts at small random numbers, because zeros cannot be standardised; at 32 bits
    it starts at zero.
    """

    def __init__(self, channels: int, width: int, bits: int, **options: Any) -> None:
        super().__init__(channels, width, nn.ReLU(), **options)
        self.down = QuantisedLinear(channels, width, bits)
        self.up = start_small(QuantisedLinear(width, channels, bits))


class QuantisedMethod(Method):
    """What methods with quantised layers share: they are stored packed."""

    family = "adapters"
    mergeable = False
    identity_at_start = False
    learning_rate = 1e-3  # the paper's, for Bi-AdaptFormer

    def starts_as_identity(self, config: Mapping[str, object]) -> bool:
        """Only at 32 bits, where the way up can start at zero."""
        return config["bits"] == FULL_BITS

    def packed(self, replacements: Replacements) -> dict[str, Tensor]:
        """Codes, mean and std in the place of each quantised weight."""
        stored = tensors_of(replacements)
        for name, layer in _quantised_layers(replacements):
            del stored[name]
            stored |= {f"{name}.{key}": t for key, t in layer.packed().items()}
        return stored

    def unpack(self, replacements: Replacements, stored: Mapping[str, Tensor]) -> None:
        """Fill the quantised layers from their codes, the rest as it is."""
        layers = dict(_quantised_layers(replacements))
        for name, tensor in tensors_of(replacements).items():
            if name in layers:
                codes, mean_std = stored[f"{name}.codes"], stored[f"{name}.mean_std"]
                layers[name].load_packed(codes, mean_std)
            else:
                tensor.copy_(stored[name])


@register
class QuantisedAdapter(QuantisedMethod, BottleneckMethod):
    """Bi-AdaptFormer: x + MLP(LN x) + s * Up(dropout(ReLU(Down x))), without biases.

    It has the place and the input of `adaptformer`. Stored: ceil(b D h / 8) + 8 bytes
    per layer. Up starts from a normal distribution with std 1e-3, cut at 2e-3, so the
    adapter is *not* an identity at the start, unless `bits` is 32. The paper tunes s
    for every task; our default is 1.
    """

    name = "quantised_adapter"
    title = "Quantised adapter (Bi-AdaptFormer)"
    paper = "Jie et al. 2023, Precision Redundancy of Adapters, arXiv 2307.16867"
    trained = "Down and Up beside each MLP, b bits a weight"
    count_formula = "2Dh per block; ceil(2bDh/8) + 16 bytes"
    note = "1 to 8 bits, stored packed"

    def in_block(
        self,
        backbone: Backbone,
        path: str,
        block: Any,
        *,
        width: int = 32,
        bits: int = 1,
        scale: float = 1.0,
        dropout: float = 0.1,
    ) -> Replacements:
        """Put a quantised adapter beside the MLP and its norm.

        Args:
            width: Channels h in the middle.
            bits: Bits per weight: 1, 2, 4, 8, or 32 for none saved.
            scale: Factor s on the adapter.
            dropout: Rate behind the ReLU.
        """
        check_whole("width", width)
        check_above_zero("scale", scale)
        check_share("dropout", dropout)
        adapter = QuantisedBottleneck(
            channels_of(block),
            width,
            bits,
            dropout=dropout,
            scale=scale,
            channels_first=channels_first(block),
        )
        return beside_mlp_branch(backbone, (path, block), adapter)


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


def _quantised_layers(
    replacements: Replacements,
) -> Iterator[tuple[str, QuantisedLinear]]:
    """Yield (name of the weight, layer) of every layer that is stored as codes."""
    for entry in replacements:
        for leaf, (holder, _) in entry.tensors.items():
            if isinstance(holder, QuantisedLinear) and holder.quantised:
                yield f"{entry.path}.{leaf}", holder
