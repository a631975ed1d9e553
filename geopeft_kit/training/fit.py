"""`fit`: train a model on a data set, measured, seeded, and resumable.

Lightning does the training; a `Plan` holds the precision, the learning rates and the
head start, and a `Run` the history, the resources and the scores. Taught in notebooks
00 and 02.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.loading import EpochSampler
from geopeft_kit.data.torchgeo_data import AnyData, as_data
from geopeft_kit.model import Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.batch_size import largest_batch, with_batch_size
from geopeft_kit.training.callbacks import (
    Checkpoint,
    EarlyStop,
    History,
    Progress,
    find_checkpoint,
)
from geopeft_kit.training.evaluate import evaluate
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.hardware import choose_device
from geopeft_kit.training.head_start import start_decoder
from geopeft_kit.training.interruption import (
    explanation,
    stoppable,
    survive,
    what_is_kept,
)
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.prefix_cache import Prefix
from geopeft_kit.training.resume import check_same_run, description_of
from geopeft_kit.training.step import Loss
from geopeft_kit.training.task import Task
from geopeft_kit.training.tracker import Resources, Tracker
from geopeft_kit.training.trainer import (
    has,
    make_trainer,
    optimiser_steps,
    quiet_lightning,
    watch_scores,
)


@dataclass
class Run:
    """What a training run leaves behind.

    Attributes:
        model: The trained model, in eval mode.
        history: One row an epoch: epoch, loss, learning_rate, seconds, and validation
            scores where asked for.
        resources: Time and memory, see `Resources`.
        metrics: Scores on the validation split after training, overall and by region;
            empty where the data has none. The test split is left to `evaluate`.
        settings: The arguments of the run, with None and "auto" resolved.
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
    loss: str | Loss = "auto",
    class_weights: Sequence[float] | Mapping[str, float] | str | None = None,
    head_start: str = "auto",
    batch_size: int | str | None = None,
    accumulate: int = 1,
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
    logger: Logger | Sequence[Logger] | bool | None = None,
) -> Run:
    """Train what is trainable in `model` on the training split of `data`.

    Args:
        model: From `build_model`, with a method attached to its backbone (without one,
            all weights train). It takes the names and colours of the data's classes.
        data: Chips with their splits; or a torchgeo data set or data module, which is
            wrapped in `TorchgeoData`, its values unchanged.
        epochs: Passes over the training split.
        learning_rate: For what trains inside the backbone; None takes the default of
            the method's card and prints it.
        decoder_learning_rate: For decoder and head; None is 1e-3.
        weight_decay: Decoupled decay on matrices.
        loss: "auto" is the cross-entropy of the task, or squared errors; "focal",
            "dice", "ce+dice" and "tversky" help rare classes, "huber" (delta 0.1) takes
            outliers of values less hard. Or a function of (logits, target) that returns
            a scalar and leaves out what has no label.
        class_weights: One number a class, a dict by class name, or "balanced": counted
            on the training split, printed, at most 10.
        head_start: How the decoder starts. "probe" trains it first on features of the
            backbone (linear probing, then fine-tuning: Kumar et al. 2022, arXiv
            2202.10054); "calibrate" only standardises the features; "none" does
            neither; "auto" is "probe" for the linear decoder and the classification
            head, else "calibrate". An untrained head on raw features misleads.
        batch_size: Images in a batch of this run; None is the data's own. "auto" takes
            the largest that fits, by `estimate_memory`, and tries it in one step.
        accumulate: Batches whose gradients are averaged for one step of the optimiser;
            the loss is still that of a batch, and the schedule counts steps.
        memory_gib: What the run may use, for "auto" and for advice; None is what is
            free.
        cache_features: Compute the maps of a frozen backbone once and train on those.
            None does so where nothing trains in the backbone and the data is not
            augmented. True also serves augmented data: all eight flips and turns of an
            image are computed once. Above 4 GiB the maps go to files under
            GEOPEFT_CACHE.
        cache_prefix: Compute the frozen blocks before the first trained one once, for
            a method with layers="last:4", say; stored like features.
        checkpointing: Keep less for the backward pass and compute it again: "mlp" in
            the MLP of each block, "blocks" in whole blocks. The same numbers, more
            time.
        precision: "auto" or a name Lightning knows. "auto" is bf16 where the GPU has it
            in hardware, 16-bit with loss scaling on older GPUs, 32-bit on a CPU, where
            bf16 is slower without matrix units for it (AMX).
        frozen_precision: "bf16" holds frozen matrices in bf16 while training, "nf4"
            (QLoRA; a GPU with bitsandbytes, 'lora' alone) in 4 bits; both need (with
            "auto": take) precision="bf16-mixed".
        optimiser: "adamw", "fused" (one kernel a step) or "8bit" (its state in bytes;
            needs torchao or bitsandbytes).
        device: "auto", "cpu" or "cuda".
        validate_every: Epochs between two validations; None validates only after
            training, or every epoch with `patience`.
        patience: Stop after that many validations without a better score, and restore
            the best weights.
        seed: Order of the samples and dropout. For the start of the weights, call
            `torch.manual_seed` before `attach` and `build_model`.
        folder: Where to write a checkpoint after each epoch; it holds only what was
            trained.
        resume: Continue from the checkpoint in `folder`, of the same model, data, seed
            and settings. On a CPU, at an equal number of threads, the final weights are
            those of a run never interrupted. A finished run is returned as it is.
        progress: Show steps, loss and the time left: a bar in a notebook or a terminal,
            some lines in a log.
        callbacks: Lightning callbacks of your own, called after the kit's. `monitor=`
            takes the columns of the history: "loss", or "val_miou" and the like, which
            are then computed every epoch.
        logger: Lightning loggers; None writes CSV files to `folder`/logs, if there is
            a folder.

    Returns:
        The `Run`.

    Raises:
        TypeError: `model` is compiled or wrapped in another module.
        ValueError: An argument is out of its range, the data's task is another, or the
            checkpoint is damaged or of another run.
        FileNotFoundError: `resume=True` and `folder` holds no checkpoint.
        KeyboardInterrupt: You stopped the run; the text says what is kept and how to
            continue. The model is intact, partly trained.
        MemoryError: Memory ran out; the text names the three cheapest remedies. The
            model is intact, partly trained.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"fit trains the model of build_model, and this is a "
            f"{type(model).__name__}, in which its learning rates cannot be told "
            "apart. Pass the model inside; model.compile() compiles it in place."
        )
    chips: ChipData = as_data(data, model.task, model.num_classes)
    place = choose_device(device)
    checkpoint = find_checkpoint(folder, resume)
    model.to(place)
    plan = Plan(
        epochs=epochs,
        learning_rate=learning_rate,
        decoder_learning_rate=decoder_learning_rate,
        weight_decay=weight_decay,
        loss=loss,
        class_weights=class_weights,
        head_start=head_start,
        batch_size=batch_size,
        accumulate=accumulate,
        memory_gib=memory_gib,
        cache_features=cache_features,
        cache_prefix=cache_prefix,
        checkpointing=checkpointing,
        precision=precision,
        frozen_precision=frozen_precision,
        optimiser=optimiser,
        validate_every=validate_every or (1 if watch_scores(callbacks) else None),
        patience=patience,
        seed=seed,
    ).resolved(model, chips, place, progress)
    if batch_size == "auto":
        plan = replace(plan, batch_size=largest_batch(model, chips, plan, place))
    if batch_size is not None:
        chips = with_batch_size(chips, plan.batch_size)
    prefix = Prefix(model) if cache_prefix else None
    images = chips.dataloader("train", shuffle=True, seed=seed)
    replay = prefix.features if prefix else None
    steps = optimiser_steps(plan, len(images), callbacks)
    about = description_of(model, chips, plan) if checkpoint else {}
    if checkpoint and resume:
        check_same_run(checkpoint, about)
    task = Task(model, plan, steps, replay)
    history = History(partial(evaluate, model, chips, "val", place), plan)
    tracker, writer = Tracker(), Checkpoint(checkpoint, about)
    shown = progress and not has(callbacks, ProgressBar)
    bar = progress_bar(shown=shown, desc="preparing", unit=" steps")
    stop = [EarlyStop(history, patience)] if patience else []
    own: list[L.Callback] = [history, tracker, *stop, writer, Progress(bar, history)]
    own += callbacks
    trainer = make_trainer(plan, place, own, len(images), folder, logger)

    def train() -> None:
        batches, cache = images, None
        if not resume and plan.head_start != "none":
            cache = start_decoder(
                model, chips, place, plan.head_start, seed, progress, task.loss
            )
        if plan.cache_features or prefix:
            batches = _cached(model, chips, plan, place, prefix, cache, progress)
        with quiet_lightning(), plan.levers(model):
            # Lightning leaves each module in the mode it finds it in.
            model.train()
            resume_from = str(checkpoint) if resume else None
            trainer.fit(task, batches, ckpt_path=resume_from, weights_only=True)

    def why() -> str:
        return explanation(model, plan, chips.image_size, place)

    def kept() -> str:
        written = resume or writer.written
        return what_is_kept(len(history.rows), epochs, folder, written)

    try:
        with bar:
            survive(partial(stoppable, train, task, kept), task, why)
    finally:
        model.to(place)  # Lightning leaves it on the CPU
    model.eval()
    if progress and not tracker.times:
        print(
            f"nothing is left to train: the run in {folder} ended after "
            f"{len(history.rows)} epochs, and the model has its weights. More epochs "
            "need a larger epochs=."
        )
    model.classes = getattr(chips, "classes", None)  # torchgeo's data has no names
    model.colours = getattr(chips, "colours", None)
    model.adapter = model.backbone.adapter
    return Run(
        model=model,
        history=history.table(),
        resources=tracker.resources(),
        metrics=evaluate(model, chips, "val", place) if "val" in chips.splits else {},
        settings=plan.settings(),
        folder=Path(folder) if folder is not None else None,
    )


def _cached(
    model: Model,
    data: ChipData,
    plan: Plan,
    place: torch.device,
    prefix: Prefix | None,
    cache: FeatureCache | None,
    progress: bool,
) -> DataLoader:
    """Shuffled batches of cached maps; features that the head start computed serve."""
    if prefix or cache is None or data.augment:
        images = data.dataloader("train", augment=False)
        cache = FeatureCache(
            model, images, place, augment=data.augment, prefix=prefix, progress=progress
        )
    sampler = EpochSampler(len(cache), plan.seed, data.augment, data.batch_size)
    return DataLoader(cache, data.batch_size, sampler=sampler, collate_fn=cache.collate)
