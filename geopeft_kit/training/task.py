"""One training step for every task: its loss, optimiser, and checkpoint contents.

`Task` is a Lightning module around a plain model of `build_model`. Its checkpoints hold
what was trained and nothing else: frozen weights are never written. Taught in
notebook 02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from geopeft_kit.data.batch import batch_meta, batch_target
from geopeft_kit.methods.base import TrainingRule
from geopeft_kit.model import Model
from geopeft_kit.training.optimisers import make_optimiser

if TYPE_CHECKING:
    from geopeft_kit.training.prefix_cache import Prefix


def compute_loss(
    output: Tensor, target: Tensor, task: str, ignore_index: int = 255
) -> Tensor:
    """The loss of a task, averaged over the labelled samples or pixels.

    Args:
        output: (B,K,H,W) or (B,K) logits, (B,1,H,W) values for regression, (B,K,H,W)
            values for super-resolution.
        target: (B,H,W) or (B,) class numbers, (B,K) zeros and ones for multilabel,
            (B,H,W) values for regression (NaN where unknown), (B,K,H,W) for
            super-resolution.
        task: "segmentation", "change", "classification", "multilabel", "regression" or
            "super_resolution".
        ignore_index: Class number that carries no label.

    Returns:
        A scalar; 0 (with a gradient of 0) for a batch without a single label.

    Raises:
        ValueError: `task` is none of the six, or the shapes of super-resolution differ.
    """
    if task == "regression":
        output = output.squeeze(1)  # (B,H,W)
        valid = torch.isfinite(target)
        error = torch.where(valid, output - target, 0.0)
        return error.square().sum() / valid.sum().clamp(min=1)
    if task == "super_resolution":
        if output.shape != target.shape:  # it would be repeated to fit, silently
            raise ValueError(
                f"the model answers {tuple(output.shape[1:])} and the finer image is "
                f"{tuple(target.shape[1:])}: (bands, H, W). Build the model with "
                "num_classes=data.num_classes and factor=data.factor."
            )
        return F.mse_loss(output, target)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
    if task in ("segmentation", "change", "classification"):
        total = F.cross_entropy(
            output, target.long(), ignore_index=ignore_index, reduction="sum"
        )
        return total / (target != ignore_index).sum().clamp(min=1)
    raise ValueError(
        f"no loss for task {task!r}; the tasks are segmentation, change, "
        "classification, multilabel, regression and super_resolution."
    )


def trained_names(model: nn.Module) -> set[str]:
    """Names of what training changes: trainable parameters and the buffers beside them.

    A buffer counts when the module that owns it trains, or when it sits in no frozen
    backbone at all (the decoder's standardisation, its batch-norm statistics).
    """
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = set(model.state_dict())
    for path, module in model.named_modules():
        in_backbone = path == "backbone" or path.startswith("backbone.")
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if in_backbone and not trains:
            continue
        prefix = f"{path}." if path else ""
        names |= {prefix + name for name, _ in module.named_buffers(recurse=False)}
    return names & kept


def cosine_with_warmup(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: linear warm-up, then a cosine to 0.

    Source: Loshchilov & Hutter 2017 (arXiv 1608.03983), without restarts.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        span = max(1, total_steps - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return factor


class Task(L.LightningModule):
    """The Lightning module that `fit` trains.

    Args:
        model: A model of `build_model`, its backbone already adapted.
        ignore_index: Class number that carries no label.
        learning_rate: For what trains inside the backbone.
        decoder_learning_rate: For the decoder and the head.
        weight_decay: Decoupled weight decay on matrices; biases and norms get none.
        total_steps: Steps of the whole run, for the schedule.
        warmup_steps: Linear warm-up before the cosine.
        seed: Seeds dropout, epoch by epoch, so that a resumed run repeats it.
        optimiser: "adamw", "fused" or "8bit", see `make_optimiser`.
        prefix: Where batches hold what the frozen blocks put out, see `Prefix`.

    Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """

    strict_loading = False  # a checkpoint holds a part of the state dict, by design

    def __init__(
        self,
        model: Model,
        ignore_index: int,
        learning_rate: float,
        decoder_learning_rate: float,
        weight_decay: float,
        total_steps: int,
        warmup_steps: int,
        seed: int,
        optimiser: str = "adamw",
        prefix: Prefix | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimiser = optimiser
        self.prefix = prefix
        self.ignore_index = ignore_index
        self.learning_rate = learning_rate
        self.decoder_learning_rate = decoder_learning_rate
        self.weight_decay = weight_decay
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.seed = seed
        adapter = getattr(model.backbone, "adapter", None)
        self.rule: TrainingRule | None = None
        if adapter is not None:
            self.rule = adapter.training_rule(total_steps)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits or values for a batch of images, or of what was cached of them."""
        if self.prefix is not None:
            maps = self.prefix.features(batch["prefix"], batch["size"])
            return self.model.from_features(maps, batch["size"])
        if "features" in batch:
            return self.model.from_features(batch["features"], batch["size"])
        return self.model(batch["image"], batch_meta(batch))

    def on_train_epoch_start(self) -> None:
        # One seed an epoch makes dropout repeatable after a resume, with no generator
        # state to store.
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = compute_loss(
            self(batch), batch_target(batch), self.model.task, self.ignore_index
        )
        return loss if self.rule is None else loss + self.rule.penalty()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.rule is not None:  # the gradients stay until the next step's backward
            self.rule.after_step(self.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimiser = make_optimiser(self.parameter_groups(), self.optimiser)
        factor = cosine_with_warmup(self.total_steps, self.warmup_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = {f"model.{name}" for name in trained_names(self.model)}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in keep}
        if self.rule is not None:
            checkpoint["training_rule"] = self.rule.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected = {f"model.{name}" for name in trained_names(self.model)}
        found = set(checkpoint["state_dict"])
        if expected != found:
            raise RuntimeError(
                "the checkpoint was written by another set-up: it lacks "
                f"{_first(expected - found)} and has {_first(found - expected)} on "
                "top. Resume with the same backbone, method, options and decoder, or "
                "pass another folder."
            )
        if self.rule is not None:
            self.rule.restore(checkpoint["training_rule"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, in groups of one learning rate and decay each."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = name.startswith("backbone.")
            rate = self.learning_rate if inside else self.decoder_learning_rate
            decay = self.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]


def _first(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    if not names:
        return "nothing"
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
