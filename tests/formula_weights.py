"""Weights and images by formula: both sides of a parity test make them from names.

The side with the upstream's classes (`benchmarks/make_parity_fixtures.py`) and the side
with the kit's fill tensors by key and shape, so only outputs have to be kept. NumPy's
legacy generator never changes its stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw(key: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on the key and the shape only."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    return torch.from_numpy(random.standard_normal(tuple(shape))).float()


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """A weight of a sensible size: gains near 1, matrices by their fan-in."""
    numbers = draw(key, shape)
    if key.endswith("scale"):
        return 0.4 + 0.1 * numbers  # what a Prithvi model learned for date and place
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * numbers
    if len(shape) < 2 or "token" in key:
        return 0.1 * numbers
    return numbers / float(np.prod(shape[1:])) ** 0.5
