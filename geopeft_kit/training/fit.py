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
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from torch.utils.data import DataLoader

from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.loading import EpochSampler
from geopeft_kit.data.torchgeo_data import AnyData, as_data
from geopeft_kit.methods import Adapter, list_methods
from geopeft_kit.model import Model
from geopeft_kit.training.callbacks import Checkpoint, EarlyStop, History
from geopeft_kit.training.evaluate import evaluate
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.head_start import resolve_head_start, start_decoder
from geopeft_kit.training.task import Task
from geopeft_kit.training.tracker import Resources, Tracker

DECODER_LEARNING_RATE = 1e-3
HEAD_STARTS = ("auto", "probe", "calibrate", "none")


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
    cache_features: bool | None = None,
    precision: str = "auto",
    device: str = "auto",
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
            all weights train).
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
        cache_features: Compute the maps of a frozen backbone once and train on those.
            None does it whenever that changes nothing: nothing trains in the backbone
            and the data is not augmented.
        precision: "auto" or a name Lightning knows. "auto" is bf16 where the GPU has it
            in hardware, 16-bit with loss scaling on older GPUs, 32-bit on a CPU.
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
        progress: Show a line or a bar that is updated at most twice a second.
        callbacks: Lightning callbacks of your own, called after the kit's.

    Returns:
        The `Run`.

    Raises:
        ValueError: An argument is out of its range, or the data's task is another.
        FileNotFoundError: `resume=True` and `folder` holds no checkpoint.
    """
    chips: ChipData = as_data(data, model.task, model.num_classes)
    _check(model, chips, epochs, head_start, folder, resume, patience)
    place = choose_device(device)
    model.to(place)
    frozen = not any(p.requires_grad for p in model.backbone.parameters())
    settings: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": _learning_rate(model, learning_rate, frozen, progress),
        "decoder_learning_rate": decoder_learning_rate or DECODER_LEARNING_RATE,
        "weight_decay": weight_decay,
        "head_start": resolve_head_start(model, head_start),
        "cache_features": _resolve_cache(model, chips, cache_features, frozen),
        "precision": choose_precision(precision, place),
        "seed": seed,
    }
    checkpoint = Path(folder) / "last.ckpt" if folder is not None else None
    cache = None
    if not resume:
        cache = start_decoder(model, chips, place, settings["head_start"], seed)
    if not settings["cache_features"]:
        loader = chips.dataloader("train", shuffle=True, seed=seed)
    else:
        loader = _cached_loader(model, chips, cache, place, seed)
    task = _make_task(model, chips, loader, settings)
    tracker = Tracker()
    history = History(
        chips, validate_every or (1 if patience else None), epochs, progress
    )
    own: list[L.Callback] = [history, tracker]
    if patience:
        own.append(EarlyStop(history, patience))
    if checkpoint is not None:
        own.append(Checkpoint(checkpoint))
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="gpu" if place.type == "cuda" else "cpu",
            devices=1,
            precision=settings["precision"],
            max_epochs=epochs,
            callbacks=[*own, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        # Lightning leaves each module in the mode it finds it in.
        model.train()
        resume_from = str(checkpoint) if resume else None
        trainer.fit(task, loader, ckpt_path=resume_from, weights_only=True)
    model.to(place).eval()
    return Run(
        model=model,
        history=history.table(),
        resources=tracker.resources(model),
        metrics=evaluate(model, chips, "val", place) if "val" in chips.splits else {},
        settings=settings,
        folder=Path(folder) if folder is not None else None,
    )


def _check(
    model: Model,
    data: ChipData,
    epochs: int,
    head_start: str,
    folder: str | Path | None,
    resume: bool,
    patience: int | None,
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be 1 or more.")
    if head_start not in HEAD_STARTS:
        raise ValueError(
            f"head_start is {head_start!r}; allowed are {', '.join(HEAD_STARTS)}."
        )
    if model.task != data.task:
        raise ValueError(
            f"the model's task is {model.task!r} and the data's is {data.task!r}. "
            f"Build the model with build_model(..., task={data.task!r})."
        )
    if patience and "val" not in data.splits:
        raise ValueError(
            f"patience={patience} needs a validation split; the data has "
            f"{', '.join(data.splits)}. Pass val_fraction to ChipData."
        )
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run to go on with.")
    if resume and folder is not None and not (Path(folder) / "last.ckpt").exists():
        raise FileNotFoundError(
            f"{folder} holds no last.ckpt to resume from. Start with resume=False; a "
            "checkpoint is written after each epoch."
        )


def _learning_rate(
    model: Model, asked: float | None, frozen: bool, progress: bool
) -> float:
    """The rate asked for, or the default of the method's card, which is printed."""
    if asked is not None:
        if asked <= 0:
            raise ValueError(f"learning_rate is {asked}; it must be above 0.")
        return asked
    if frozen:
        return 0.0
    name = _method(model)
    card = next(card for card in list_methods() if card.name == name)
    rate = card.learning_rate or 0.0
    if progress:
        print(f"learning_rate {rate:g} (default of {name!r})")
    return rate


def _method(model: Model) -> str:
    """Key of the active method; a backbone without one trains in full."""
    adapter: Adapter | None = getattr(model.backbone, "adapter", None)
    return "full" if adapter is None else adapter.name


def _resolve_cache(
    model: Model, data: ChipData, asked: bool | None, frozen: bool
) -> bool:
    if asked is None:
        return frozen and not data.augment
    if asked and not frozen:
        raise ValueError(
            "cache_features=True needs a frozen backbone, but "
            f"{_method(model)!r} trains inside it. Attach 'frozen', or leave "
            "cache_features at None."
        )
    if asked and data.augment:
        raise ValueError(
            "cache_features=True needs images that do not change, but the data is "
            "augmented. Build the data with augment=False."
        )
    return asked


def _cached_loader(
    model: Model,
    data: ChipData,
    cache: FeatureCache | None,
    place: torch.device,
    seed: int,
) -> DataLoader:
    """Batches of cached maps; those that the head start computed serve again."""
    if cache is None:
        cache = FeatureCache(model, data.dataloader("train", augment=False), place)
    sampler = EpochSampler(len(cache), seed, drop_last_of=data.batch_size)
    return DataLoader(cache, data.batch_size, sampler=sampler, collate_fn=cache.collate)


def _make_task(
    model: Model, data: ChipData, loader: DataLoader, settings: dict[str, Any]
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
