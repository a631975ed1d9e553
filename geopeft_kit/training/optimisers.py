"""The optimisers that `fit` offers: AdamW, and two that cost less; their schedule.

AdamW keeps two running means in 32 bits for each trained number. "fused" updates them
in one kernel a step; "8bit" keeps each in a byte, with a scale for every 256 (Dettmers
et al. 2022, arXiv 2110.02861, section 2). Taught in notebook 08.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

OPTIMISERS = ("adamw", "fused", "8bit")
BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # tensors below this keep 32 bits, in both libraries


def make_optimiser(groups: list[dict[str, Any]], kind: str = "adamw") -> Optimizer:
    """An AdamW: "adamw", "fused" or "8bit"; ValueError if no library provides it."""
    check_optimiser(kind)
    if kind == "8bit":
        return _find_8bit()(groups)
    return torch.optim.AdamW(groups, fused=kind == "fused" or None)


def check_optimiser(kind: str) -> None:
    """Raise where `make_optimiser` would, before anything is computed."""
    if kind not in OPTIMISERS:
        raise ValueError(f"optimiser is {kind!r}; allowed are {', '.join(OPTIMISERS)}.")
    if kind == "8bit":
        _find_8bit()


def optimiser_state_bytes(sizes: Sequence[int], kind: str = "adamw") -> int:
    """Bytes that an optimiser keeps for such tensors, step counters included."""
    total = 0
    for size in sizes:
        small = kind == "8bit" and size >= SMALLEST
        total += 2 * (size + 4 * -(-size // BLOCK)) if small else 8 * size
    return total + 4 * len(sizes)


def cosine_with_warmup(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up, then a cosine to 0.

    Source: Loshchilov & Hutter 2017 (arXiv 1608.03983), without restarts.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        span = max(1, total_steps - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _find_8bit() -> Any:
    """AdamW8bit of bitsandbytes (GPU only) or torchao, whichever is installed."""
    if torch.cuda.is_available():
        try:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit
        except ImportError:
            pass  # torchao has one as well
    try:
        from torchao.optim import AdamW8bit

        return AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimiser='8bit' needs torchao, or on a GPU bitsandbytes, and neither is "
            "installed. `pip install torchao`, or choose optimiser='adamw': with few "
            "trained tensors its state is small anyway (see estimate_memory)."
        ) from error
