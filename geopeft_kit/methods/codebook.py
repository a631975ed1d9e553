"""Few bits per weight: levels for a normal distribution, and codes packed into bytes.

A weight of a quantised layer is one of 2^b levels. The levels are fixed, made once for
numbers from N(0, 1); a layer brings its weights to that scale and back. Taught in
notebook 06.

Source: Jie, Wang and Deng 2023 (ICCV), Revisiting the Parameter Efficiency of Adapters
from the Perspective of Precision Redundancy, arXiv 2307.16867.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import ndtr, ndtri

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


def expected_error(bits: int) -> float:
    """Return the expected distance of a number from N(0, 1) to its nearest level.

    A cell from a to b with median v has 2 density(v) - density(a) - density(b) of it.
    """
    levels = torch.tensor(levels_for_normal(bits), dtype=torch.float64, device="cpu")
    ends = F.pad(_density(thresholds_between(levels)), (1, 1))  # (K + 1,)
    return float((2 * _density(levels) - ends[1:] - ends[:-1]).sum())


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
