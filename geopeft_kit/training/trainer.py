"""The Lightning trainer of `fit`: its callbacks, logger, and number of steps."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    GradientAccumulationScheduler,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from geopeft_kit.training.plan import Plan


def make_trainer(
    plan: Plan,
    place: torch.device,
    callbacks: Sequence[L.Callback],
    batches: int,
    folder: str | Path | None = None,
    logger: Any = None,
) -> L.Trainer:
    """A trainer for callbacks of the kit and of Lightning; CSV logs go to `folder`.

    Without a folder or a logger, callbacks that need one get a logger that keeps
    nothing.
    """
    if logger is None:
        logger = CSVLogger(folder, name="logs") if folder else DummyLogger()
    with quiet_lightning():
        return L.Trainer(
            accelerator="gpu" if place.type == "cuda" else "cpu",
            devices=1,
            precision=plan.precision,
            max_epochs=plan.epochs,
            accumulate_grad_batches=plan.accumulate,
            callbacks=list(callbacks),
            logger=logger,
            log_every_n_steps=min(50, batches),
            default_root_dir=folder,
            enable_checkpointing=has(callbacks, Checkpoint),
            enable_progress_bar=has(callbacks, ProgressBar),
            enable_model_summary=has(callbacks, ModelSummary),
            num_sanity_val_steps=0,
        )


def has(callbacks: Sequence[L.Callback], kind: type[L.Callback]) -> bool:
    """Whether one of the callbacks is of a kind."""
    return any(isinstance(callback, kind) for callback in callbacks)


def watch_scores(callbacks: Sequence[L.Callback]) -> bool:
    """Whether a callback monitors a validation score, which must then be computed."""
    names = [getattr(callback, "monitor", None) or "" for callback in callbacks]
    return any(name.startswith("val_") for name in names)


def optimiser_steps(plan: Plan, batches: int, callbacks: Sequence[L.Callback]) -> int:
    """Steps of the optimiser in the whole run; the last batches of an epoch make one.

    Raises ValueError if gradients are to be accumulated in two ways.
    """
    brought = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    if brought and plan.accumulate > 1:
        raise ValueError(
            f"accumulate is {plan.accumulate}, and callbacks hold a "
            "GradientAccumulationScheduler as well. Pass one of the two."
        )
    schedule = [*brought, GradientAccumulationScheduler({0: plan.accumulate})][0]
    factors = map(schedule.get_accumulate_grad_batches, range(plan.epochs))
    return sum(math.ceil(batches / factor) for factor in factors)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's start-up lines and its advice on data workers and loggers."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
            warnings.filterwarnings("ignore", ".*tensorboard.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            warnings.filterwarnings("ignore", ".*in eval mode at the start.*")
            warnings.filterwarnings("ignore", ".*overriding `LightningModule.optimi.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
