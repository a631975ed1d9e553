"""Two threads, one backbone: who computes, and who touches the widgets.

Training runs in a separate thread on the backbone that the page uses as well, so that
no weight is in memory twice. `TrainingLock` lets the page compute between two batches:
the page swaps adapters and swaps the training's adapter back, which is exact.
`MainThreadQueue` carries the training's reports to the thread that owns the widgets,
because a widget that two threads write to loses messages.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.model import Model
from geopeft_kit.training.callbacks import History
from geopeft_kit.training.tracker import MIB, Tracker

REPORT_S = 0.25  # seconds between two reports of a training


class Cancelled(Exception):
    """The training was asked to stop."""


class TrainingLock:
    """Lets one thread at a time compute, and hands over between two batches.

    Attributes:
        stop: Set to end the training the next time it would hand over.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._computing = threading.Lock()
        self._next = threading.Lock()  # whoever holds it gets the other lock next
        self._trainer: int | None = None  # the training thread
        self._in_batch = False

    def __deepcopy__(self, memo: Any) -> TrainingLock:
        return self  # a copy of a network keeps its hooks to the same lock

    def _acquire(self) -> None:
        with self._next:
            self._computing.acquire()

    @contextmanager
    def training(self) -> Iterator[None]:
        """The training's side: computes all the time, but for `hand_over`."""
        self._acquire()
        self._trainer = threading.get_ident()
        try:
            yield
        finally:
            self._trainer, self._in_batch = None, False
            self._computing.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else computes; torch's random state is restored. Not to be nested."""
        self._acquire()
        try:
            with torch.random.fork_rng():
                yield
        finally:
            self._computing.release()

    @contextmanager
    def borrow(self, backbone: Backbone) -> Iterator[None]:
        """The page's side: compute, and leave no trace in a training under way.

        A training's active adapter and the backbone's mode are restored at the end.
        """
        with self.exclusive():
            active: Any = backbone.adapter
            mode = backbone.training
            try:
                yield
            finally:
                if self._trainer is not None and active is not None:
                    active.activate()
                    backbone.train(mode)

    def hand_over(self, *_: Any) -> None:
        """Let the page compute if it waits. Raises Cancelled where `stop` is set."""
        if threading.get_ident() != self._trainer or self._in_batch:
            return
        if self.stop.is_set():
            raise Cancelled
        if self._next.locked():  # the page waits; it goes first, then this thread
            self._computing.release()
            self._acquire()

    @contextmanager
    def handing_over(self, model: Model) -> Iterator[None]:
        """Hand over before each pass through the backbone or the decoder.

        That covers what runs outside Lightning: the head start, and the scores.
        """
        parts: list[nn.Module] = [model.backbone, model.decoder]
        handles = [part.register_forward_pre_hook(self.hand_over) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batch(self, inside: bool) -> None:
        """A timed training step begins or ends; inside one nothing is handed over."""
        self._in_batch = inside


class TrainingThread(threading.Thread):
    """The thread of one training; it ends with the process."""

    def __init__(
        self, lock: TrainingLock, work: Callable[[Any], None], choice: Any
    ) -> None:
        super().__init__(target=work, args=(choice,), daemon=True)
        self.lock = lock


def stop_trainings() -> bool:
    """Ask all trainings of this process to stop; whether there was one.

    A cell that is run again makes a new explorer; nothing else reaches the old one.
    """
    threads = [t for t in threading.enumerate() if isinstance(t, TrainingThread)]
    for thread in threads:
        thread.lock.stop.set()
    return bool(threads)


class Reporter(L.Callback):
    """Reports the state of a training a few times a second.

    Args:
        lock: Handed over between two steps.
        report: Called with a dict: step, steps, losses, rows, step_ms, memory (peak
            MiB of this process, or of the GPU).
    """

    def __init__(
        self, lock: TrainingLock, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.lock, self.report = lock, report
        self.losses: list[float] = []
        self.unread: list[Tensor] = []  # losses still on the device
        self.last = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.lock.batch(inside=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        self.lock.batch(inside=False)
        self.unread.append(outputs["loss"].detach())
        if time.monotonic() - self.last > REPORT_S:
            self._report(trainer)
        self.lock.hand_over()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        # One copy from the device for all losses since the last report.
        self.losses += torch.stack(self.unread).tolist() if self.unread else []
        self.unread, self.last = [], time.monotonic()
        parts: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        history = next(part for part in parts if isinstance(part, History))
        tracker = next(part for part in parts if isinstance(part, Tracker))
        self.report(
            {
                "step": trainer.global_step,
                "steps": int(trainer.estimated_stepping_batches),
                "losses": list(self.losses),
                "rows": [dict(row) for row in history.rows],
                "step_ms": 1000 * tracker.times[-1],
                "memory": tracker.memory.peak() / MIB,
            }
        )


class MainThreadQueue:
    """Calls functions in the thread that made it: the one that owns the widgets.

    In a notebook they are called as soon as the kernel is idle; elsewhere, and while a
    cell is running, when `run` is called.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable, tuple]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # a plain script: `wait` calls `run`

    def put(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Ask for a call; from any thread."""
        self._calls.put((function, arguments))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.run)

    def run(self) -> None:
        """Make the calls that were asked for, in order."""
        while not self._calls.empty():
            function, arguments = self._calls.get()
            function(*arguments)
