"""The batch size of one run: another one than the data's own, or the largest that fits.

Taught in notebook 08.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.model import Model
from geopeft_kit.training.hardware import autocast
from geopeft_kit.training.interruption import explanation, is_out_of_memory, survive
from geopeft_kit.training.optimisers import make_optimiser
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.step import rule_of, step
from geopeft_kit.training.task import parameter_groups


def with_batch_size(data: ChipData, size: int) -> ChipData:
    """The same data in batches of another size; shares what was already read."""
    other = copy.copy(data)
    other.batch_size = size
    return other


def largest_batch(
    model: Model, data: ChipData, plan: Plan, device: torch.device
) -> int:
    """The largest batch that fits: estimated, then tried in one real step.

    The model is the same afterwards. Raises MemoryError if not even one image fits.
    """
    pixels = data.image_size
    estimate = replace(plan, batch_size=data.batch_size).estimate(model, pixels)
    chips = len(data.dataset("train"))
    size = min(estimate.largest_batch(plan.room_mib(model) / 1024), chips)

    def explain() -> str:
        tried = replace(plan, batch_size=max(1, size))
        return explanation(model, tried, pixels, device)

    if size < 1:
        raise MemoryError(explain())
    while size > 1:
        try:
            _try_step(model, data, plan, size, device)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        size = 3 * size // 4  # the estimate was too low here
    survive(lambda: _try_step(model, data, plan, 1, device), model, explain)
    return 1


def _try_step(
    model: Model, data: ChipData, plan: Plan, size: int, device: torch.device
) -> None:
    """One full training step with a learning rate of 0: the model does not change."""
    still = replace(
        plan, learning_rate=0.0, decoder_learning_rate=0.0, weight_decay=0.0
    )
    loader = with_batch_size(data, size).dataloader("train")
    batch = Batch.of(next(iter(loader))).to(device)
    loss = plan.make_loss(model.task)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), plan.levers(model):
            model.train()
            groups = parameter_groups(model.named_parameters(), still)
            optimiser = make_optimiser(groups, plan.optimiser)
            with autocast(plan.precision, device.type):
                value = step(model, batch, loss, rule=rule_of(model))
            value.backward()
            optimiser.step()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
