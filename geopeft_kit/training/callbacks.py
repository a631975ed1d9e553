"""Lightning callbacks of `fit`: history, progress, checkpoint, early stopping."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from geopeft_kit.progress import REDRAW_S
from geopeft_kit.training.evaluate import HEADLINE
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.task import trained_names


class History(L.Callback):
    """Keeps one row an epoch, with the scores of `validate` every so many epochs."""

    def __init__(self, validate: Callable[[], dict[str, Any]], plan: Plan) -> None:
        self.validate, self.every = validate, plan.validate_every
        self.rows: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.losses = []
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        # Lightning divides what it sums over several batches
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": float(torch.stack(self.losses).mean()),
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": time.perf_counter() - self.began,
        }
        if self.every and epoch % self.every == 0:
            scores = self.validate()["overall"]
            row |= {f"val_{name}": value for name, value in scores.items()}
        self.rows.append(row)
        pl_module.log_dict({k: v for k, v in row.items() if k != "epoch"})

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame, one an epoch."""
        return pd.DataFrame(self.rows)


class Progress(L.Callback):
    """Shows epoch, steps, loss, scores and the time left on a bar of `progress_bar`.

    The bar has no total yet, is shared by `runs` trainings of equal length, and is
    closed by the caller; scores come from `history`.
    """

    def __init__(
        self, bar: Any, history: History | None = None, title: str = "", runs: int = 1
    ) -> None:
        self.bar, self.history, self.title, self.runs = bar, history, title, runs
        self.shown = -math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._name_epoch(trainer)
        if self.bar.total is None:
            steps = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
            self.bar.reset(steps * self.runs)
        if trainer.current_epoch:  # resumed: those steps say nothing about the speed
            done = trainer.current_epoch * int(trainer.num_training_batches)
            self.bar.n = self.bar.initial = self.bar.last_print_n = done

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._name_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        if time.monotonic() - self.shown > REDRAW_S / 2:  # a GPU waits to tell a loss
            self._show_numbers(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.bar.update()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.history is not None:
            self._show_numbers(self.history.rows[-1]["loss"])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.runs == 1:
            self.bar.total = self.bar.n  # stopped early, it is complete all the same

    def _name_epoch(self, trainer: L.Trainer) -> None:
        epoch = f"{self.title}epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.bar.set_description_str(epoch, refresh=False)

    def _show_numbers(self, loss: float) -> None:
        row = self.history.rows[-1] if self.history and self.history.rows else {}
        scores = [f"{k[4:]} {v:.3f}" for k, v in row.items() if k.startswith("val_")]
        text = ", ".join([f"loss {loss:.4f}", *scores])
        self.bar.set_postfix_str(text, refresh=False)
        self.shown = time.monotonic()


class EarlyStop(L.Callback):
    """Stops after `patience` looks without improvement; restores the best weights."""

    def __init__(self, history: History, patience: int) -> None:
        self.history = history
        self.patience = patience
        self.best = -math.inf
        self.waited = 0
        self.weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.waited = state_dict["waited"]
        self.weights = state_dict["weights"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.should_stop = self.waited >= self.patience  # resumed after its end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        name, larger = HEADLINE[pl_module.model.task]
        score = self.history.rows[-1].get(f"val_{name}")
        if score is None:
            return
        score = score if larger else -score
        if score > self.best:  # never NaN, the score of a model that diverged
            self.best, self.waited = score, 0
            state = pl_module.model.state_dict()
            names = trained_names(pl_module.model)
            self.weights = {key: state[key].clone() for key in names}
            return
        self.waited += 1
        trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.weights:  # also where a resumed run has no epoch left
            pl_module.model.load_state_dict(self.weights, strict=False)


class WriteInPlace(TorchCheckpointIO):
    """Writes to the path itself, not first to the disk of temporary files."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


class Checkpoint(L.Callback):
    """Writes a checkpoint after each epoch, whole or not at all; None writes none.

    `about` describes the run to those that resume it, see `resume.description_of`.
    """

    def __init__(self, path: Path | None, about: Mapping[str, str] | None = None):
        self.path, self.about = path, about
        self.written = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = WriteInPlace()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if self.about:
            checkpoint["run"] = dict(self.about)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(unfinished)  # every process takes part in it
            if trainer.is_global_zero:
                os.replace(unfinished, self.path)
            self.written = True
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"could not write the checkpoint {self.path} ({error}). The one of the "
                "epoch before is untouched; free some space and pass resume=True."
            ) from error


def find_checkpoint(folder: str | Path | None, resume: bool) -> Path | None:
    """Where a run keeps its checkpoint; errors where `resume` finds none to read."""
    if folder is None:
        if resume:
            raise ValueError("resume=True needs the folder of the run to continue.")
        return None
    checkpoint = Path(folder) / "last.ckpt"
    if resume:
        _check_content(checkpoint)
    return checkpoint


def _check_content(checkpoint: Path) -> None:
    """Compare each record of a checkpoint with the checksum in its zip file."""
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint.parent} holds no last.ckpt, so there is nothing to resume. "
            "Start with resume=False; a checkpoint is written after each epoch."
        )
    try:
        with ZipFile(checkpoint) as file:
            damaged = file.testzip() is not None
    except BadZipFile:
        damaged = True
    if damaged:
        raise ValueError(
            f"{checkpoint} was damaged after it was written: its content does not "
            "match its checksums. Restore it from a copy, or start with resume=False."
        )
