"""The Lightning module around a training step: optimiser, schedule, checkpoint.

Checkpoints hold what was trained and nothing else: frozen weights are never written.
Taught in notebook 02.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from geopeft_kit.data.batch import Batch
from geopeft_kit.model import Model
from geopeft_kit.training.optimisers import cosine_with_warmup, make_optimiser
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.step import Replay, output_of, rule_of, step


class Task(L.LightningModule):
    """The Lightning module that `fit` trains; its rates and seed are the plan's.

    `replay` turns cached maps into features, see `Prefix`.
    """

    strict_loading = False  # a checkpoint holds a part of the state dict, by design

    def __init__(
        self, model: Model, plan: Plan, total_steps: int, replay: Replay | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.total_steps = total_steps
        self.replay = replay
        self.loss = plan.make_loss(model.task)
        self.rule = rule_of(model, total_steps)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits or values for a loader's batch of images, or of what was cached."""
        return output_of(self.model, Batch.of(batch), self.replay)

    def on_train_epoch_start(self) -> None:
        # One seed an epoch makes dropout repeatable after a resume, with no generator
        # state to store.
        torch.manual_seed(self.plan.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return step(self.model, Batch.of(batch), self.loss, self.replay, self.rule)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.rule is not None:  # the gradients stay until the next backward pass
            self.rule.after_step(self.global_step + 1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups(self.model.named_parameters(), self.plan)
        optimiser = make_optimiser(groups, self.plan.optimiser)
        factor = cosine_with_warmup(self.total_steps, min(self.total_steps // 10, 200))
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
        if self.rule is not None:
            self.rule.restore(checkpoint["training_rule"])


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], plan: Plan
) -> list[dict[str, Any]]:
    """What trains, in groups of one learning rate and one weight decay each.

    Biases and norms do not decay. Source: AdamW, Loshchilov & Hutter 2019 (arXiv
    1711.05101).
    """
    groups: dict[tuple[Any, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            inside = name.startswith("backbone.")
            rate = plan.learning_rate if inside else plan.decoder_learning_rate
            decay = plan.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def trained_names(model: nn.Module) -> set[str]:
    """Names of what training changes: trainable parameters and the buffers beside them.

    A buffer counts when the module that owns it trains, or when it is in no frozen
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
