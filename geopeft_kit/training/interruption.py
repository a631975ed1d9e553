"""Training that ends early: the stop button, or no memory; everything stays alive.

Lightning answers Ctrl-C, and the stop button of a notebook, with `sys.exit(1)` and
leaves the signal ignored, which would end the kernel of a widget. Here the user gets a
`KeyboardInterrupt` that says what is kept. A step that does not fit into memory ends in
a `MemoryError` that names the cheapest changes that make room. Taught in notebook 08.
"""

from __future__ import annotations

import gc
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import parts_to_recompute
from geopeft_kit.training.hardware import has_bf16
from geopeft_kit.training.memory import MemoryEstimate
from geopeft_kit.training.optimisers import check_optimiser
from geopeft_kit.training.plan import Plan

# Words of PyTorch's allocators, and of oneDNN, which says nothing more.
_ALLOCATOR = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a primitive",
)


@dataclass(frozen=True)
class WayOut:
    """A change of `fit`'s arguments, its price, and the memory the run then needs."""

    change: dict[str, Any]
    price: str
    total_mib: float

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.change.items())
        return f"fit(..., {arguments}): {self.total_mib:,.0f} MiB; {self.price}"


def survive(
    train: Callable[[], None], network: nn.Module, explain: Callable[[], str]
) -> None:
    """Run a training; if memory runs out, free what it held and raise MemoryError.

    `explain` gives the text; it is called once there is room again.
    """
    try:
        train()
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no room"
        let_go(network, error)
    raise MemoryError(f"{explain()}\n(PyTorch said: {reason[:200]})")


def let_go(network: nn.Module, error: BaseException) -> None:
    """Free what a failed training held; eval mode, as after a successful one."""
    for one in (error, error.__context__):
        if one is not None:
            traceback.clear_frames(one.__traceback__)  # they hold the last step
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
    model: Model, plan: Plan, image_size: tuple[int, int], device: torch.device
) -> str:
    """The text of the error: what the run needed, and the three cheapest changes."""
    needed = plan.estimate(model, image_size)
    lines = [
        f"out of memory: {needed.method!r} at batch {needed.batch_size} needs about "
        f"{needed.total_mib:,.0f} MiB (activations {needed.activations_mib:,.0f}, "
        f"weights {needed.weights_mib + needed.originals_mib:,.0f}). The model and "
        "this session are intact. The cheapest ways out for this run:"
    ]
    found = _ways_out(model, plan, needed, device)
    lines += [f"{number}. {way}" for number, way in enumerate(found[:3], start=1)]
    if not found:
        lines.append(
            'none by settings: attach(..., layers="last:4"), or a smaller model'
        )
    return "\n".join(lines)


def _ways_out(
    model: Model, plan: Plan, needed: MemoryEstimate, device: torch.device
) -> list[WayOut]:
    """Changes that save memory, those that make the run fit first, cheapest first."""
    found, room = [], plan.room_mib(model)
    for change, price in _candidates(model, plan, device):
        changed = replace(plan, **change)
        total = changed.estimate(model, needed.image_size).total_mib
        if total < 0.97 * needed.total_mib:
            found.append(WayOut(change, price, total))
    fitting = [way for way in found if way.total_mib <= room]
    others = [way for way in found if way.total_mib > room]
    return fitting + sorted(others, key=lambda way: way.total_mib)


def _candidates(
    model: Model, plan: Plan, device: torch.device
) -> list[tuple[dict[str, Any], str]]:
    """What can be changed in this run, cheapest first."""
    found: list[tuple[dict[str, Any], str]] = []
    if plan.checkpointing is None and _possible(parts_to_recompute, model, "mlp"):
        price = "the same numbers, each MLP runs twice"
        found.append(({"checkpointing": "mlp"}, price))
    if plan.checkpointing != "blocks":
        price = "the same numbers, each block runs twice"
        found.append(({"checkpointing": "blocks"}, price))
    if plan.frozen_precision is None and has_bf16(device):
        change = {"precision": "bf16-mixed", "frozen_precision": "bf16"}
        found.append((change, "products are rounded to bf16"))
    if plan.optimiser != "8bit" and _possible(check_optimiser, "8bit"):
        found.append(({"optimiser": "8bit"}, "the optimiser's means are rounded"))
    if plan.batch_size > 1:
        half = plan.batch_size // 2
        found.append(({"batch_size": half}, "more steps an epoch, noisier gradients"))
    return found


def _possible(check: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a check that raises ValueError passes."""
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


def stoppable(
    train: Callable[[], None], network: nn.Module, say: Callable[[], str]
) -> None:
    """Run a training; if the user stops it, free what it held and say what is kept.

    The network is in eval mode afterwards, without gradients. `say` gives the text of
    the KeyboardInterrupt.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        train()
        return
    except (KeyboardInterrupt, SystemExit) as error:
        by_lightning = isinstance(error.__context__, KeyboardInterrupt)
        if isinstance(error, SystemExit) and not by_lightning:
            raise
        let_go(network, error)
    if by_lightning:
        signal.signal(signal.SIGINT, handler)
    raise KeyboardInterrupt(say())


def what_is_kept(
    epochs: int, planned: int, folder: str | Path | None, written: bool
) -> str:
    """What a stopped training leaves after `epochs` full ones, and how to resume."""
    after = f"stopped after {epochs} of {planned} epochs; the model is intact, and "
    if written:
        return (
            f"{after}{folder} holds the last complete epoch. To continue from it: the "
            f"same call with folder={str(folder)!r}, resume=True."
        )
    if folder is not None:
        return (
            f"{after}no epoch of this run was complete, so there is no checkpoint to "
            "resume from. Build the model again to start over."
        )
    return (
        f"{after}nothing was written. With folder=... a stopped run can be resumed "
        "from its last complete epoch."
    )
