"""Two threads, one backbone: who computes, and who touches the widgets.

Training runs in a thread of its own on the same backbone that the page looks at, so
that no weight is held twice. `Turns` lets the page in between two batches: it swaps
adapters, computes what it needs, and swaps the training's adapter back, which is exact.
`Mailbox` brings what the training has to say to the thread that owns the widgets,
because a widget that two threads write to loses messages. Taught in notebook 13.
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

EVERY = 0.25  # seconds between two messages from a training


class Cancelled(Exception):
    """The training was asked to stop."""


class Turns:
    """Lets one thread at a time compute, and hands over between two batches.

    Attributes:
        stop: Set to end the training at its next breath.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._computing = threading.Lock()
        self._next = threading.Lock()  # whoever holds it gets the other lock next
        self._worker: int | None = None
        self._in_batch = False

    def __deepcopy__(self, memo: Any) -> Turns:
        return self  # a copy of a network keeps its hooks to the same turns

    def _take(self) -> None:
        with self._next:
            self._computing.acquire()

    @contextmanager
    def work(self) -> Iterator[None]:
        """The training's side: computes all the time, and breathes when it can."""
        self._take()
        self._worker = threading.get_ident()
        try:
            yield
        finally:
            self._worker, self._in_batch = None, False
            self._computing.release()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nobody else computes, and the state of torch's random numbers comes back.

        Not to be nested: inside, the turn is already the caller's.
        """
        self._take()
        try:
            with torch.random.fork_rng():
                yield
        finally:
            self._computing.release()

    @contextmanager
    def borrow(self, backbone: Backbone) -> Iterator[None]:
        """The page's side: compute, and leave no trace in a training under way.

        Args:
            backbone: While a training runs, its active adapter and its mode come back
                at the end.
        """
        with self.pause():
            active: Any = backbone.adapter
            mode = backbone.training
            try:
                yield
            finally:
                if self._worker is not None and active is not None:  # a training's
                    active.activate()
                    backbone.train(mode)

    def breathe(self, *_: Any) -> None:
        """Let the page in, and end where that was asked for.

        Raises:
            Cancelled: `stop` is set.
        """
        if threading.get_ident() != self._worker or self._in_batch:
            return
        if self.stop.is_set():
            raise Cancelled
        if self._next.locked():  # the page waits; it goes first, then this thread
            self._computing.release()
            self._take()

    @contextmanager
    def breathing(self, model: Model) -> Iterator[None]:
        """Breathe before each pass through the backbone or the decoder.

        That covers what runs outside of Lightning: the head start, and the scores.
        """
        parts: list[nn.Module] = [model.backbone, model.decoder]
        handles = [part.register_forward_pre_hook(self.breathe) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batch(self, inside: bool) -> None:
        """Say that a training step begins or ends; its clock runs, so no breath."""
        self._in_batch = inside


class Watch(L.Callback):
    """Tells how a training is going, a few times a second.

    Args:
        turns: Asked to breathe between two steps.
        tell: Called with a dict: step, steps, losses, rows, step_ms, memory
            (peak MiB of this process, or of the GPU).
    """

    def __init__(self, turns: Turns, tell: Callable[[dict[str, Any]], None]) -> None:
        self.turns, self.tell = turns, tell
        self.losses: list[float] = []
        self.fresh: list[Tensor] = []
        self.last = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.turns.batch(inside=True)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.turns.batch(inside=False)
        self.fresh.append(outputs["loss"].detach())
        if time.monotonic() - self.last > EVERY:
            self._report(trainer)
        self.turns.breathe()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        # One copy from the device for all losses since the last report.
        self.losses += torch.stack(self.fresh).tolist() if self.fresh else []
        self.fresh, self.last = [], time.monotonic()
        parts: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        history = next(part for part in parts if isinstance(part, History))
        tracker = next(part for part in parts if isinstance(part, Tracker))
        self.tell(
            {
                "step": trainer.global_step,
                "steps": int(trainer.estimated_stepping_batches),
                "losses": list(self.losses),
                "rows": [dict(row) for row in history.rows],
                "step_ms": 1000 * tracker.times[-1],
                "memory": tracker.memory.peak() / MIB,
            }
        )


class Mailbox:
    """Calls functions in the thread that made it: the one that owns the widgets.

    In a notebook they are called as soon as the kernel is idle; elsewhere, and while a
    cell is running, when `deliver` is called.
    """

    def __init__(self) -> None:
        self._letters: queue.SimpleQueue[tuple[Callable, tuple]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # a plain script: `deliver` is called by `wait`

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Ask for a call; from any thread."""
        self._letters.put((function, arguments))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """Make the calls that were asked for, in order."""
        while not self._letters.empty():
            function, arguments = self._letters.get()
            function(*arguments)
