"""The batch size: the data's own, another one, or the largest that fits.

`ChipData` carries the batch size, because every loader of the data needs one. `fit`
changes it for one run alone, on a shallow copy of the data, as `ChipData.subset` does.
Taught in notebook 08.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from geopeft_kit.data.chips import ChipData
from geopeft_kit.devices import moved
from geopeft_kit.model import Model
from geopeft_kit.training.checkpointing import checkpointed
from geopeft_kit.training.frozen_precision import frozen_held_in
from geopeft_kit.training.hardware import free_gib
from geopeft_kit.training.memory import estimate_memory
from geopeft_kit.training.optimisers import make_optimiser
from geopeft_kit.training.out_of_memory import explanation, is_out_of_memory, survive
from geopeft_kit.training.task import Task
from geopeft_kit.training.tracker import MIB, weight_bytes

SHARE = 0.9  # of what is free; the rest is left to others


def with_batch_size(data: ChipData, size: int | str) -> ChipData:
    """The same data in batches of another size; shares what was already read."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"batch_size is {size!r}; it must be a whole number from 1, 'auto', or "
            "None for the data's own."
        )
    other = copy.copy(data)
    other.batch_size = size
    return other


def room_mib(model: Model, device: torch.device, memory_gib: float | None) -> float:
    """What a run may use, the weights that are there already included."""
    if memory_gib is not None:
        if not 0 < memory_gib < float("inf"):
            raise ValueError(f"memory_gib is {memory_gib}; it must be above 0.")
        return memory_gib * 1024
    return SHARE * free_gib(device) * 1024 + weight_bytes(model) / MIB


def largest_batch(
    model: Model,
    data: ChipData,
    run: dict[str, Any],
    device: torch.device,
    room: float,
) -> int:
    """The largest batch that fits `room` MiB: estimated, then tried in one real step.

    `run` holds the arguments of `estimate_memory`. The model is the same afterwards.
    Raises MemoryError if not even one image fits.
    """
    estimate = estimate_memory(model, **run)
    chips = len(data.dataset("train"))
    size = min(estimate.largest_batch(room / 1024), chips)

    def explain() -> str:
        return explanation(model, run | {"batch_size": max(1, size)}, device, room)

    if size < 1:
        raise MemoryError(explain())
    while size > 1:
        batch = _first_batch(data, size)
        try:
            _one_step(model, batch, data, run, device)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        size = 3 * size // 4  # the estimate was too hopeful here
    batch = _first_batch(data, 1)
    survive(lambda: _one_step(model, batch, data, run, device), model, explain)
    return 1


def _first_batch(data: ChipData, size: int) -> dict[str, Any]:
    return next(iter(with_batch_size(data, size).dataloader("train")))


def _one_step(
    model: Model,
    batch: dict[str, Any],
    data: ChipData,
    run: dict[str, Any],
    device: torch.device,
) -> None:
    """One full training step with a learning rate of 0: nothing of the model moves."""
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(
        run["precision"]
    )
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    training = model.training
    there = moved(batch, device)
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            frozen_held_in(model, run["frozen_precision"]),
            checkpointed(model, run["checkpointing"]),
        ):
            model.train()
            task = Task(model, data.ignore_index, 0.0, 0.0, 0.0, 1, 0, 0)
            optimiser = make_optimiser(task.parameter_groups(), run["optimiser"])
            with torch.autocast(device.type, low, enabled=low is not None):
                loss = task.training_step(there, 0)
            loss.backward()
            optimiser.step()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
