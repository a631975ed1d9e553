"""`pretrain`: the loop around the pretext task, measured and resumable."""

from __future__ import annotations

import math
import time
from numbers import Integral
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.backbones.weights import save_weights
from geopeft_kit.data.chips import ChipData
from geopeft_kit.pretraining.distillation import Teacher
from geopeft_kit.pretraining.result import EnergyMeter, Pretraining
from geopeft_kit.pretraining.samples import Draws, Samples, SizedSamples
from geopeft_kit.pretraining.task import Objective, PretextTask
from geopeft_kit.training.callbacks import Checkpoint, find_checkpoint
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.interruption import stoppable, what_is_kept
from geopeft_kit.training.tracker import Tracker
from geopeft_kit.training.trainer import quiet_lightning

WEIGHTS = "weights.safetensors"


def pretrain(
    backbone: Backbone,
    data: ChipData | SizedSamples,
    teacher: Backbone | None = None,
    *,
    masked: float = 1.0,
    alpha: float = 1.0,
    stage: int = 3,
    mask_ratio: float = 0.6,
    mask_unit: int | None = None,
    physical: float = 10.0,
    scene: float = 1.0,
    crop: int | None = None,
    epochs: int = 10,
    steps_per_epoch: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    precision: str = "auto",
    device: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    minutes: float | None = None,
    progress: bool = True,
) -> Pretraining:
    """Pretrain a backbone in place, from random weights or from those it has.

    GFM's recipe for Swin-B is `mask_ratio=0.6, mask_unit=32, alpha=1, stage=3,
    crop=192, epochs=100, learning_rate=2e-4 * global_batch / 512` on random weights,
    with an ImageNet-22k Swin-B loaded for 224 px as the teacher. Its warm-up (a tenth),
    cosine, weight decay and gradient clipping (5) are those of every run. With an
    adapter attached, the adapter is all that trains in the backbone, as in ExPLoRA
    (arXiv 2406.10973).

    Args:
        backbone: A plain ViT or a Swin; what requires a gradient trains.
        data: A `ChipData`, whose training images are read (of one without labels all
            of them), or samples with `image` (C,H,W) reflectance and, where known,
            `physical` (P,H,W) and `scene` (S,) scaled to about unit spread, NaN where
            unknown.
        teacher: A frozen backbone that sees the whole image, enlarged to the size it
            was loaded for; None uses none.
        masked: Weight of masked modelling; 0 hides nothing.
        alpha: Weight of the angle to the teacher's features.
        stage: Where features are compared, 1 to 4, see `stage_path`.
        mask_ratio: Share of the cells that is hidden.
        mask_unit: Side of a cell in pixels; None is the backbone's largest stride.
        physical: Weight of the dense maps, where samples have them.
        scene: Weight of the scene facts, where samples have them.
        crop: Crop 67 to 100 % of each image, resize it to this side and flip it; None
            leaves images unchanged.
        epochs: Parts of the run, each ending with a checkpoint.
        steps_per_epoch: Optimiser steps of one, drawn with replacement; None is one
            pass over the data.
        batch_size: Samples a step on each device.
        learning_rate: Peak rate.
        precision: As in `fit`.
        device: As in `fit`.
        devices: Their number; above 1 Lightning starts a process for each.
        strategy: Lightning's name of how they share the work; "auto" is DDP.
        seed: Start of the heads, order of the samples, hidden cells.
        folder: Where a checkpoint is written after each epoch, and weights at the end.
        resume: Continue from it with the same schedule; further epochs keep its last
            rate. On a CPU, at an equal number of threads, the weights are those of a
            run never interrupted.
        minutes: Stop after the epoch in which they are over, for a long run in parts;
            None has no limit.
        progress: Print a line an epoch.

    Returns:
        The `Pretraining`: history, cost, and the task for a look at reconstructions.

    Raises:
        TypeError: `data` is something else.
        ValueError: Backbone, teacher, images or options do not fit, or are not those of
            the run to resume.
        FileNotFoundError: `resume=True` without a checkpoint.
        KeyboardInterrupt: You stopped the run; the text says what is kept.
    """
    counts = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "crop": crop}
    _check_counts(**counts, batch_size=batch_size, devices=devices)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0.")
    checkpoint = find_checkpoint(folder, resume)
    place = choose_device(device)
    _check_adapter(backbone, teacher)
    samples = Samples(data, crop)
    draws = Draws(len(samples), batch_size, devices, steps_per_epoch, seed)
    torch.manual_seed(seed)
    task = PretextTask(
        backbone,
        Objective(masked, alpha, physical, scene, mask_ratio, mask_unit, stage),
        None if teacher is None else Teacher(teacher, backbone.bands, stage),
        physical=samples.length("physical"),
        scene=samples.length("scene"),
        learning_rate=learning_rate,
        total_steps=draws.steps * epochs,
    )
    log, tracker = _Log(seed, progress, minutes), Tracker()
    writer = Checkpoint(checkpoint)
    # A generator of its own: making an iterator would draw from the masks' state.
    own = torch.Generator().manual_seed(seed)
    loader: DataLoader = DataLoader(samples, batch_size, sampler=draws, generator=own)
    meter = EnergyMeter(list(range(devices)) if place.type == "cuda" else [])
    with quiet_lightning():
        precision = choose_precision(precision, place)
        callbacks: list[L.Callback] = [log, tracker, writer]
        trainer = _trainer(place, devices, strategy, precision, epochs, callbacks)
        meter.start()
        began = time.perf_counter()
        backbone.train()
        resume_from = str(checkpoint) if resume else None

        def train() -> None:
            trainer.fit(task, loader, ckpt_path=resume_from, weights_only=True)

        def words() -> str:
            written = resume or writer.written
            return what_is_kept(len(log.rows), epochs, folder, written)

        try:
            stoppable(train, task, words)
        finally:
            task.to(place)  # Lightning leaves it on the CPU
        seconds = time.perf_counter() - began
    task.eval()
    run = Pretraining(
        task,
        pd.DataFrame(log.rows),
        tracker.resources() if tracker.times else None,
        seconds,
        meter.watt_hours(),
    )
    adapter = getattr(backbone, "adapter", None)
    if folder is not None and adapter is None and trainer.is_global_zero:
        run.weights = save_weights(backbone, Path(folder) / WEIGHTS, half=False)
    return run


def _trainer(
    place: torch.device,
    devices: int,
    strategy: str,
    precision: Any,
    epochs: int,
    callbacks: list[L.Callback],
) -> L.Trainer:
    if devices > 1 and strategy == "auto":
        # with the teacher alone, what comes after its stage gets no gradient
        strategy = "ddp_find_unused_parameters_true"
    return L.Trainer(
        accelerator="gpu" if place.type == "cuda" else "cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_epochs=epochs,
        gradient_clip_val=5.0,
        use_distributed_sampler=False,  # ours knows its rank
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise ValueError(f"{name} is {count!r}; it is a whole number, 1 or more.")


def _check_adapter(backbone: Backbone, teacher: Backbone | None) -> None:
    """Errors for a teacher that would train, and for a student that would not."""
    if teacher is backbone:
        raise ValueError(
            "the teacher is the backbone itself, so it would change with it. Load it a "
            "second time: teacher = gk.load_backbone(...)."
        )
    adapter = getattr(backbone, "adapter", None)
    if adapter is None and not any(p.requires_grad for p in backbone.parameters()):
        raise ValueError(
            "nothing trains in the backbone: an adapter froze it and was deactivated. "
            "Call its activate() or detach(); attach 'frozen' to train the heads alone."
        )
    if adapter is not None and adapter.training_rule(1) is not None:
        raise ValueError(
            f"{adapter.name!r} changes its own form while it trains, which only `fit` "
            "knows how to do. Attach 'lora' or 'slr'."
        )


class _Log(L.Callback):
    """One row an epoch; seeds each, so that a resumed run draws alike."""

    def __init__(self, seed: int, progress: bool, minutes: float | None) -> None:
        self.seed, self.progress = seed, progress
        seconds = math.inf if minutes is None else 60 * minutes
        self.until = time.monotonic() + seconds
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch * trainer.world_size + trainer.global_rank
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        self.losses: list[dict[str, Tensor]] = []
        self.samples = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(pl_module.losses)
        self.samples += len(batch["image"]) * trainer.world_size

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row["samples"] = self.samples + (self.rows[-1]["samples"] if self.rows else 0)
        for name in self.losses[0]:
            row[name] = float(torch.stack([step[name] for step in self.losses]).mean())
        self.rows.append(row)
        # one process that stops alone would leave the others waiting
        over = trainer.strategy.reduce_boolean_decision(
            time.monotonic() > self.until, all=False
        )
        trainer.should_stop = trainer.should_stop or over
        if self.progress and trainer.is_global_zero:
            print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
