"""Lightning callbacks of `fit`: history and progress, checkpoint, early stopping."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch import Tensor

from geopeft_kit.data.chips import ChipData
from geopeft_kit.training.evaluate import HEADLINE, evaluate
from geopeft_kit.training.task import trained_names


class History(L.Callback):
    """Keeps one row an epoch and shows it.

    In a notebook one display is updated in place, at most twice a second; in a log each
    epoch is a line, thinned out to about ten lines a run.

    Args:
        data: For validation scores.
        validate_every: Epochs between two validations; None for none.
        epochs: Epochs in all, for the display.
        progress: Whether to show anything.
    """

    def __init__(
        self, data: ChipData, validate_every: int | None, epochs: int, progress: bool
    ) -> None:
        self.data = data
        self.validate_every = validate_every
        self.epochs = epochs
        self.rows: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        self.display = _Display(epochs) if progress else None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.losses = []
        self.began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "loss": float(torch.stack(self.losses).mean()),
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": time.perf_counter() - self.began,
        }
        if self.validate_every and epoch % self.validate_every == 0:
            scores = evaluate(pl_module.model, self.data, "val", pl_module.device)
            row |= {f"val_{name}": value for name, value in scores["overall"].items()}
        self.rows.append(row)
        if self.display:
            self.display.show(row)

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame, one an epoch."""
        return pd.DataFrame(self.rows)


class EarlyStop(L.Callback):
    """Stops when validation no longer improves, and goes back to the best weights.

    Args:
        history: Where the scores come from.
        patience: Looks without improvement before stopping.
    """

    def __init__(self, history: History, patience: int) -> None:
        self.history = history
        self.patience = patience
        self.best: float | None = None
        self.waited = 0
        self.weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.waited = state_dict["waited"]
        self.weights = state_dict["weights"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        name, larger = HEADLINE[pl_module.model.task]
        score = self.history.rows[-1].get(f"val_{name}")
        if score is None:
            return
        score = score if larger else -score
        if self.best is None or score > self.best:
            self.best, self.waited = score, 0
            state = pl_module.model.state_dict()
            names = trained_names(pl_module.model)
            self.weights = {key: state[key].clone() for key in names}
            return
        self.waited += 1
        trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.weights:
            pl_module.model.load_state_dict(self.weights, strict=False)


class Checkpoint(L.Callback):
    """Writes a checkpoint after each epoch, whole or not at all.

    Args:
        path: The file; the one of the epoch before is replaced only by a complete one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(unfinished)  # every process takes part in it
            if trainer.is_global_zero:
                os.replace(unfinished, self.path)
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"could not write the checkpoint {self.path} ({error}). The one of the "
                "epoch before is untouched; free some space and pass resume=True."
            ) from error


class _Display:
    """One line in place in a notebook, about ten lines in a log."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.handle: Any = None
        self.last = 0.0

    def show(self, row: dict[str, Any]) -> None:
        scores = [f"{k[4:]} {v:.3f}" for k, v in row.items() if k.startswith("val_")]
        text = f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}"
        text = "  ".join([text, *scores])
        final = row["epoch"] == self.epochs
        if _in_notebook():
            if final or time.monotonic() - self.last > 0.5:
                self._update(text)
                self.last = time.monotonic()
        elif final or row["epoch"] % max(1, self.epochs // 10) == 0:
            print(text, flush=True)

    def _update(self, text: str) -> None:
        from IPython.display import DisplayHandle

        content = {"text/plain": text}
        if self.handle is None:
            self.handle = DisplayHandle()
            self.handle.display(content, raw=True)
        else:
            self.handle.update(content, raw=True)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"
