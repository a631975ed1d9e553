"""What training costs: time per step, peak memory, and what the memory is spent on.

Activations are counted exactly: the bytes that autograd keeps between the forward and
the backward pass, each storage once, parameters excluded. Taught in notebooks 02
and 08.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from geopeft_kit.training.hardware import PeakMemory

MIB = 2**20


@dataclass(frozen=True)
class Resources:
    """What one training run took; times in milliseconds, memory in MiB.

    Attributes:
        device: "cpu" or the name of the GPU.
        precision: Lightning's name of the precision, e.g. "32-true".
        step_ms: Median wall time of a training step, warm-up excluded.
        step_ms_p90: Its 90th percentile.
        samples_per_second: Batch size over median step time.
        timed_steps: Number of steps behind the two times.
        peak_mib: Highest memory in use: CUDA allocator, or resident set on a CPU.
        peak_growth_mib: `peak_mib` minus what was in use before training began.
        weights_mib: All weights of the model, frozen ones included.
        gradients_mib: Gradients of what is trained.
        optimiser_mib: State of the optimiser (two moments per number for AdamW).
        activations_mib: Tensors kept for the backward pass of one step.
    """

    device: str
    precision: str
    step_ms: float
    step_ms_p90: float
    samples_per_second: float
    timed_steps: int
    peak_mib: float
    peak_growth_mib: float
    weights_mib: float
    gradients_mib: float
    optimiser_mib: float
    activations_mib: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, e.g. for one row of a DataFrame."""
        return asdict(self)


@contextmanager
def count_saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes that autograd saves for the backward pass inside this context.

    A storage that several tensors share counts once; the model's own parameters do not
    count. Tensors without memory behind them (meta, fake) count as if they had it.

    Args:
        model: The model whose parameters are left out.

    Yields:
        A dict from storage to size in bytes; its sum is the answer.

    Example:
        >>> with count_saved_bytes(model) as saved:
        ...     loss = model(image).sum()
        >>> sum(saved.values())
    """
    # `_cdata` tells storages apart, also those that have no address
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        # The tensor itself would refer to its own graph: a circle that outlives a step
        # which fails before its backward pass.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, trained or frozen, each counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that exist now."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(g.numel() * g.element_size() for g in gradients)


def optimiser_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's own tensors."""
    return sum(
        value.numel() * value.element_size()
        for state in optimiser.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


class Tracker(L.Callback):
    """A Lightning callback that measures time and memory of a training run.

    The first `warmup` steps are not timed (of fewer steps in all, the last is timed
    alone). Saved tensors are counted in the first, so that counting does not disturb
    the clock.
    """

    def __init__(self, warmup: int = 3) -> None:
        self.warmup = warmup
        self.times: list[float] = []
        self.samples = 0
        self.saved: dict[int, int] | None = None
        self.weights = self.gradients = self.optimiser = 0
        self._counting: Any = None
        self._before: dict[str, Any] | None = None  # of the run that is resumed

    def state_dict(self) -> dict[str, Any]:
        if not self.times:
            return self._before or {}
        self.peak = self.memory.peak()
        return self.resources().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict or None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.memory = PeakMemory(pl_module.device)
        self.memory.start()
        self.precision = str(trainer.precision)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._synchronise()
        self._began = time.perf_counter()
        if self.saved is None:
            self._counting = count_saved_bytes(pl_module)
            self.saved = self._counting.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        self._stop_counting()

    def on_exception(self, *_: Any) -> None:
        self._stop_counting()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.gradients:
            self.weights = weight_bytes(pl_module)
            self.gradients = gradient_bytes(pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._synchronise()
        self.times.append(time.perf_counter() - self._began)
        count = len(batch["region"] if "region" in batch else batch["image"])
        self.samples = max(self.samples, count)
        if not self.optimiser:
            self.optimiser = optimiser_bytes(trainer.optimizers[0])
        self.memory.sample()

    def on_train_end(self, *_: Any) -> None:
        self.peak = self.memory.peak()

    def resources(self) -> Resources:
        """Sum up the run after training; RuntimeError if no step was trained."""
        if not self.times and self._before is not None:
            return Resources(**self._before)  # no step was left
        if not self.times:
            raise RuntimeError(
                "the tracker saw no training step. Train with it first, for instance "
                "by passing it in Trainer(callbacks=[tracker])."
            )
        timed = np.array(self.times[self.warmup :] or self.times[-1:]) * 1000
        median = float(np.median(timed))
        device = self.memory.device
        on_gpu = device.type == "cuda"
        return Resources(
            device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
            precision=self.precision,
            step_ms=median,
            step_ms_p90=float(np.percentile(timed, 90)),
            samples_per_second=self.samples / median * 1000,
            timed_steps=len(timed),
            peak_mib=self.peak / MIB,
            peak_growth_mib=(self.peak - self.memory.floor) / MIB,
            weights_mib=self.weights / MIB,
            gradients_mib=self.gradients / MIB,
            optimiser_mib=self.optimiser / MIB,
            activations_mib=sum((self.saved or {}).values()) / MIB,
        )

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None

    def _synchronise(self) -> None:
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)
