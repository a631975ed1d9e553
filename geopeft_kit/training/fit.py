"""`fit`: train a model on a data set, measured, seeded, and resumable.

Lightning does the training; this room chooses the precision, the learning rates and the
head start, and hands back a `Run` with the history, the resources and the scores.
Taught in notebooks 00 and 02.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
import torch
from torch.utils.data import DataLoader

from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.loading import EpochSampler
from geopeft_kit.data.torchgeo_data import AnyData, as_data
from geopeft_kit.model import Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.batch_size import (
    largest_batch,
    room_mib,
    with_batch_size,
)
from geopeft_kit.training.callbacks import Checkpoint, EarlyStop, History, Progress
from geopeft_kit.training.checkpointing import checkpointed
from geopeft_kit.training.evaluate import evaluate
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.frozen_precision import frozen_held_in
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.head_start import resolve_head_start, start_decoder
from geopeft_kit.training.interruption import stoppable, what_is_kept
from geopeft_kit.training.out_of_memory import explanation, survive
from geopeft_kit.training.prefix_cache import Prefix
from geopeft_kit.training.settings import (
    check_levers,
    check_run,
    default_rate,
    resolve_cache,
)
from geopeft_kit.training.task import Task
from geopeft_kit.training.tracker import Resources, Tracker

DECODER_LEARNING_RATE = 1e-3


@dataclass
class Run:
    """What a training run leaves behind.

    Attributes:
        model: The trained model, in eval mode.
        history: One row an epoch: epoch, loss, learning_rate, seconds, and the
            validation scores where they were asked for.
        resources: Time and memory, see `Resources`.
        metrics: Scores on the validation split after training, overall and by region;
            empty where the data has none. The test split is left to `evaluate`.
        settings: The arguments that produced the run.
        folder: Where the checkpoint is, or None.
    """

    model: Model
    history: pd.DataFrame
    resources: Resources
    metrics: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def fit(
    model: Model,
    data: AnyData,
    epochs: int = 10,
    learning_rate: float | None = None,
    decoder_learning_rate: float | None = None,
    weight_decay: float = 0.05,
    head_start: str = "auto",
    batch_size: int | str | None = None,
    memory_gib: float | None = None,
    cache_features: bool | None = None,
    cache_prefix: bool = False,
    checkpointing: str | None = None,
    precision: str = "auto",
    frozen_precision: str | None = None,
    optimiser: str = "adamw",
    device: str | torch.device = "auto",
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[L.Callback] = (),
) -> Run:
    """Train what is trainable in `model` on the training split of `data`.

    Args:
        model: From `build_model`, with a method attached to its backbone (without one,
            all weights train). It takes the names and colours of the data's classes.
        data: Chips with their splits; or a torchgeo data set or data module, which is
            taken as `TorchgeoData` takes it, its values as they are.
        epochs: Passes over the training split.
        learning_rate: For what trains inside the backbone; None takes the default of
            the method's card and prints it.
        decoder_learning_rate: For decoder and head; None is 1e-3.
        weight_decay: Decoupled decay on matrices.
        head_start: What the decoder starts from. "probe" trains it first on features
            of the backbone as it stands, the linear-probe-then-fine-tune recipe of
            Kumar et al. 2022 (arXiv 2202.10054); "calibrate" only standardises the
            features; "none" does neither; "auto" is "probe" for the linear decoder and
            the classification head, else "calibrate". A fresh head on raw features
            tells false stories about every method.
        batch_size: Images in a batch of this run; None is the data's own. "auto" takes
            the largest that fits, by `estimate_memory`, and tries it in one step.
        memory_gib: What the run may use, for "auto" and for advice; None is what is
            free.
        cache_features: Compute the maps of a frozen backbone once and train on those.
            None does it whenever that changes nothing and costs nothing: nothing trains
            in the backbone and the data is not augmented. True also serves augmented
            data: all eight flips and turns of an image are computed once. Above 4 GiB
            the maps go to files under GEOPEFT_CACHE.
        cache_prefix: Compute the frozen blocks before the first trained one once, for
            a method with layers="last:4", say; stored like features.
        checkpointing: Keep less for the backward pass and compute it again: "mlp" in
            the MLP of each block, "blocks" in whole blocks. The same numbers, more
            time.
        precision: "auto" or a name Lightning knows. "auto" is bf16 where the GPU has it
            in hardware, 16-bit with loss scaling on older GPUs, 32-bit on a CPU: one
            without matrix units for bf16 (AMX) multiplies slower in it than in 32 bits.
        frozen_precision: "bf16" holds frozen matrices in bf16 while training, "nf4"
            (QLoRA; a GPU with bitsandbytes, 'lora' alone) in 4 bits; both need (with
            "auto": take) precision="bf16-mixed".
        optimiser: "adamw", "fused" (one kernel a step) or "8bit" (its state in bytes;
            needs torchao or bitsandbytes).
        device: "auto", "cpu" or "cuda".
        validate_every: Epochs between two looks at the validation split; None looks
            only after training, unless `patience` is set (then every epoch).
        patience: Stop after that many looks without a better score, and go back to the
            best weights seen.
        seed: Order of the samples and dropout. The start of the weights is the
            caller's: seed before `attach` and `build_model`.
        folder: Where to write a checkpoint after each epoch; it holds only what was
            trained.
        resume: Continue from the checkpoint in `folder`. On a CPU, at an equal number
            of threads, the final weights are those of a run never interrupted.
        progress: Show steps, loss and the time that is left: a bar in a notebook or a
            terminal, some lines in a log.
        callbacks: Lightning callbacks of your own, called after the kit's.

    Returns:
        The `Run`.

    Raises:
        ValueError: An argument is out of its range, or the data's task is another.
        FileNotFoundError: `resume=True` and `folder` holds no checkpoint.
        KeyboardInterrupt: You stopped the run; the text says what is kept and how to go
            on. The model is alive, part of the way trained.
        MemoryError: Memory ran out; the text names the three cheapest ways out. The
            model is alive, part of the way trained.
    """
    chips: ChipData = as_data(data, model.task, model.num_classes)
    check_run(model, chips, epochs, head_start, folder, resume, patience)
    place = choose_device(device)
    model.to(place)
    run: dict[str, Any] = {
        "batch_size": chips.batch_size,
        "image_size": chips.image_size,
        "precision": choose_precision(precision, place, frozen_precision),
        "checkpointing": checkpointing,
        "frozen_precision": frozen_precision,
        "optimiser": optimiser,
    }
    check_levers(model, run, place)
    room = room_mib(model, place, memory_gib)
    if batch_size == "auto":
        batch_size = largest_batch(model, chips, run, place, room)
    if batch_size is not None:
        # Anything else that is no number is refused there.
        chips = with_batch_size(chips, cast(int, batch_size))
        run["batch_size"] = chips.batch_size
    frozen = not any(p.requires_grad for p in model.backbone.parameters())
    settings: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": default_rate(model, learning_rate, frozen, progress),
        "decoder_learning_rate": decoder_learning_rate or DECODER_LEARNING_RATE,
        "weight_decay": weight_decay,
        "head_start": resolve_head_start(model, head_start, chips.one_size),
        "cache_features": resolve_cache(
            model, chips, cache_features, frozen, cache_prefix
        ),
        "cache_prefix": cache_prefix,
        "seed": seed,
        **run,
    }
    checkpoint = Path(folder) / "last.ckpt" if folder is not None else None
    tracker = Tracker()
    history = History(chips, validate_every or (1 if patience else None))
    writer = Checkpoint(checkpoint)
    bar = progress_bar(shown=progress, desc="preparing", unit=" steps")
    own: list[L.Callback] = [history, tracker]
    if patience:
        own.append(EarlyStop(history, patience))
    own += [writer, Progress(bar, history)]

    def train() -> None:
        prefix = Prefix(model) if cache_prefix else None
        loader = _start(model, chips, prefix, settings, place, resume, progress)
        task = _make_task(model, chips, loader, settings, prefix)
        trainer = _make_trainer(settings, place, [*own, *callbacks])
        with (
            quiet_lightning(),
            frozen_held_in(model, frozen_precision),
            checkpointed(model, checkpointing),
        ):
            # Lightning leaves each module in the mode it finds it in.
            model.train()
            resume_from = str(checkpoint) if resume else None
            trainer.fit(task, loader, ckpt_path=resume_from, weights_only=True)

    def words() -> str:
        written = resume or writer.written
        return what_is_kept(len(history.rows), epochs, folder, written)

    guarded = partial(stoppable, train, model, words)
    try:
        with bar:
            survive(guarded, model, lambda: explanation(model, run, place, room))
    finally:
        model.to(place)  # Lightning leaves it on the CPU
    model.eval()
    if not tracker.times:
        raise ValueError(
            f"nothing is left to train: the run in {folder} has its {epochs} epochs. "
            "The model now has its weights."
        )
    model.classes = getattr(chips, "classes", None)  # torchgeo's data has no names
    model.colours = getattr(chips, "colours", None)
    model.adapter = model.backbone.adapter
    return Run(
        model=model,
        history=history.table(),
        resources=tracker.resources(),
        metrics=evaluate(model, chips, "val", place) if "val" in chips.splits else {},
        settings=settings,
        folder=Path(folder) if folder is not None else None,
    )


def _start(
    model: Model,
    data: ChipData,
    prefix: Prefix | None,
    settings: dict[str, Any],
    place: torch.device,
    resume: bool,
    progress: bool,
) -> DataLoader:
    """Start the decoder, and make the batches of images or of what is cached of them.

    The features that the head start computed serve again.
    """
    seed, cache = settings["seed"], None
    if not resume:
        how = settings["head_start"]
        cache = start_decoder(model, data, place, how, seed, progress)
    if not (settings["cache_features"] or prefix):
        return data.dataloader("train", shuffle=True, seed=seed)
    if prefix or cache is None or data.augment:
        images = data.dataloader("train", augment=False)
        cache = FeatureCache(
            model, images, place, augment=data.augment, prefix=prefix, progress=progress
        )
    sampler = EpochSampler(len(cache), seed, data.augment, data.batch_size)
    return DataLoader(cache, data.batch_size, sampler=sampler, collate_fn=cache.collate)


def _make_trainer(
    settings: dict[str, Any], place: torch.device, callbacks: list[L.Callback]
) -> L.Trainer:
    with quiet_lightning():
        return L.Trainer(
            accelerator="gpu" if place.type == "cuda" else "cpu",
            devices=1,
            precision=settings["precision"],
            max_epochs=settings["epochs"],
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def _make_task(
    model: Model,
    data: ChipData,
    loader: DataLoader,
    settings: dict[str, Any],
    prefix: Prefix | None,
) -> Task:
    steps = len(loader) * settings["epochs"]
    return Task(
        model,
        ignore_index=data.ignore_index,
        learning_rate=settings["learning_rate"],
        decoder_learning_rate=settings["decoder_learning_rate"],
        weight_decay=settings["weight_decay"],
        total_steps=steps,
        warmup_steps=min(steps // 10, 200),
        seed=settings["seed"],
        optimiser=settings["optimiser"],
        prefix=prefix,
    )


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
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
