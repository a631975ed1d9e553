"""Out of memory: one clear error with the cheapest ways out, and everything alive.

A training step that does not fit must not end the notebook. The error is caught, what
the step held is let go, and the memory estimate says which changes would make room for
this very run. Taught in notebook 08.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import parts_to_recompute
from geopeft_kit.training.hardware import has_bf16
from geopeft_kit.training.memory import MemoryEstimate, estimate_memory
from geopeft_kit.training.optimisers import check_optimiser

# Words of PyTorch's allocators, and of oneDNN, which says nothing more.
_ALLOCATOR = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",
)


@dataclass(frozen=True)
class WayOut:
    """One change of `fit`'s arguments that saves memory.

    Attributes:
        change: Argument -> value.
        price: What it costs, in words.
        total_mib: What the run then needs, by the estimate.
    """

    change: dict[str, Any]
    price: str
    total_mib: float

    def __str__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in self.change.items()
        )
        return f"fit(..., {arguments}): {self.total_mib:,.0f} MiB; {self.price}"


def survive(
    train: Callable[[], None], model: Model, explain: Callable[[], str]
) -> None:
    """Run a training; if memory runs out, free what it held and raise MemoryError.

    The text is that of `explain`, which is called once there is room again.
    """
    try:
        train()
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no room"
        let_go(model, error)
    raise MemoryError(f"{explain()}\n(PyTorch said: {reason[:200]})")


def let_go(network: nn.Module, error: BaseException) -> None:
    """Free what a failed training held; eval mode, as after a successful one.

    The frames of `error` hold the tensors of the last step.
    """
    for one in (error, error.__context__):
        if one is not None:
            traceback.clear_frames(one.__traceback__)
    network.zero_grad(set_to_none=True)
    network.eval()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _ALLOCATOR
    )


def explanation(
    model: Model, run: dict[str, Any], device: torch.device, room_mib: float
) -> str:
    """The text of the error: what the run needed, and the three cheapest ways out.

    `run` holds the arguments of `estimate_memory`.
    """
    needed = estimate_memory(model, **run)
    lines = [
        f"out of memory: {needed.method!r} at batch {needed.batch_size} needs about "
        f"{needed.total_mib:,.0f} MiB (activations {needed.activations_mib:,.0f}, "
        f"weights {needed.weights_mib + needed.originals_mib:,.0f}). The model and "
        "this session are intact. The cheapest ways out for this run:"
    ]
    found = ways_out(model, needed, run, device, room_mib)
    lines += [f"{number}. {way}" for number, way in enumerate(found[:3], start=1)]
    if not found:
        lines.append(
            'none by settings: attach(..., layers="last:4"), or a smaller model'
        )
    return "\n".join(lines)


def ways_out(
    model: Model,
    needed: MemoryEstimate,
    run: dict[str, Any],
    device: torch.device,
    room_mib: float,
) -> list[WayOut]:
    """Changes that save memory, those that make the run fit first, cheapest first."""
    found = []
    for change, price in _candidates(model, run, device):
        total = estimate_memory(model, **{**run, **change}).total_mib
        if total < 0.97 * needed.total_mib:
            found.append(WayOut(change, price, total))
    fitting = [way for way in found if way.total_mib <= room_mib]
    others = [way for way in found if way.total_mib > room_mib]
    return fitting + sorted(others, key=lambda way: way.total_mib)


def _candidates(
    model: Model, run: dict[str, Any], device: torch.device
) -> list[tuple[dict[str, Any], str]]:
    """What can be changed in this run, cheapest first."""
    found: list[tuple[dict[str, Any], str]] = []
    if run["checkpointing"] is None:
        if _has_mlp(model):
            price = "the same numbers, each MLP runs twice"
            found.append(({"checkpointing": "mlp"}, price))
    if run["checkpointing"] != "blocks":
        price = "the same numbers, each block runs twice"
        found.append(({"checkpointing": "blocks"}, price))
    if run["frozen_precision"] is None and has_bf16(device):
        change = {"precision": "bf16-mixed", "frozen_precision": "bf16"}
        found.append((change, "products are rounded to bf16"))
    if run["optimiser"] != "8bit" and _offers_8bit():
        found.append(({"optimiser": "8bit"}, "the optimiser's means are rounded"))
    if run["batch_size"] > 1:
        half = run["batch_size"] // 2
        found.append(({"batch_size": half}, "more steps an epoch, noisier gradients"))
    return found


def _has_mlp(model: Model) -> bool:
    try:
        return bool(parts_to_recompute(model, "mlp"))
    except ValueError:
        return False


def _offers_8bit() -> bool:
    try:
        check_optimiser("8bit")
    except ValueError:
        return False
    return True
