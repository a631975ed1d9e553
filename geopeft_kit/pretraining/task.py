"""The pretext task: a backbone, its losses and their heads, and the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.pretraining.distillation import (
    Teacher,
    feature_loss,
    stage_features,
    stage_width,
)
from geopeft_kit.pretraining.masking import (
    draw_cells,
    embedding_width,
    enlarged,
    hidden_tokens,
    masked_l1,
)

WARMUP = 0.1  # of all steps: 10 of 100 epochs
FIRST_RATE, LAST_RATE = 0.005, 0.05  # of the peak: 1e-6 and 1e-5 of 2e-4


@dataclass(frozen=True)
class Objective:
    """How much each part of the pretext task counts; 0 leaves a part out.

    Attributes:
        masked: Reconstruction of hidden cells, L1 on normalised reflectance. With 0
            nothing is hidden.
        alpha: Angle to the teacher's features, where there is a teacher.
        physical: Dense maps, `physical` (P,H,W) in the samples, NaN where unknown.
        scene: Facts about the scene, `scene` (S,) in the samples, NaN where unknown.
        mask_ratio: Share of the cells that is hidden.
        mask_unit: Side of a cell in pixels; None is the backbone's largest stride.
        stage: Of student and teacher, see `stage_path`.
    """

    masked: float = 1.0
    alpha: float = 1.0
    physical: float = 10.0
    scene: float = 1.0
    mask_ratio: float = 0.6
    mask_unit: int | None = None
    stage: int = 3

    def __post_init__(self) -> None:
        for name in ("masked", "alpha", "physical", "scene"):
            weight = getattr(self, name)
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}; a weight is 0 or more.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}; it is a share between 0 and 1 "
                "(0.6). masked=0 hides nothing."
            )

    def weight(self, part: str) -> float:
        """What the loss "masked", "teacher", "physical" or "scene" is multiplied by."""
        return float(self.alpha if part == "teacher" else getattr(self, part))


class PretextTask(L.LightningModule):
    """A backbone with a mask token and one linear head per objective.

    All of the backbone trains, or the adapter alone. `physical` and `scene` count the
    dense maps and the scene facts of the samples.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        teacher: Teacher | None = None,
        physical: int = 0,
        scene: int = 0,
        learning_rate: float = 1e-3,
        total_steps: int = 1,
    ) -> None:
        super().__init__()
        there = {"masked": 1, "teacher": teacher, "physical": physical, "scene": scene}
        if not any(part and objective.weight(name) for name, part in there.items()):
            raise ValueError(
                "there is nothing to learn: masked=0, and no teacher or alpha=0. Pass "
                "a teacher with alpha=1, or leave masked at 1."
            )
        width, coarse = embedding_width(backbone), backbone.channels[-1]
        self.backbone = backbone
        self.objective = objective
        self.learning_rate = float(learning_rate)
        self.total_steps = total_steps
        self.stride = backbone.strides[-1]
        self.unit = _unit(backbone, objective)
        known = getattr(backbone, "mask_token", None)
        start = nn.init.trunc_normal_(torch.empty(width), std=0.02)
        self.mask_token = nn.Parameter(
            start if known is None else known.flatten().clone()
        )
        self.pixels = nn.Linear(coarse, len(backbone.bands) * self.stride**2)
        # in a tuple, so that it is no part of this module
        self.teachers: tuple[Teacher, ...] = () if teacher is None else (teacher,)
        self.projector: nn.Linear | None = None
        if teacher is not None:
            own = stage_width(backbone, objective.stage)
            self.projector = nn.Linear(own, teacher.width)
        # 2 x 2 cells of every dense map for each token
        self.physical = nn.Linear(coarse, 4 * physical) if physical else None
        self.scene = nn.Linear(coarse, scene) if scene else None
        adapter = getattr(backbone, "adapter", None)
        numbers = asdict(objective) | {"learning_rate": learning_rate}
        self.recipe: dict[str, str | float | None] = {
            **{k: None if v is None else float(v) for k, v in numbers.items()},
            "backbone": backbone.card.name,
            "bands": ", ".join(backbone.bands),
            "adapter": None if adapter is None else adapter.name,
            "teacher": None if teacher is None else teacher.backbone.card.name,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another recipe: a part of it would be ignored."""
        then = checkpoint.get("recipe", self.recipe)  # older checkpoints have none
        changed = [
            f"{name}={then[name]!r} (now {now!r})"
            for name, now in self.recipe.items()
            if then[name] != now
        ]
        if changed:
            raise ValueError(
                f"the run to resume had {', '.join(changed)}. Resume it with the same "
                "arguments, or start another one in another folder."
            )

    def on_fit_start(self) -> None:
        for teacher in self.teachers:
            teacher.to(self.device)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.compute_losses(batch)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        weigh = self.objective.weight
        return torch.stack([weigh(part) * loss for part, loss in losses.items()]).sum()

    def compute_losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unweighted losses of a batch: masked, teacher, physical, scene.

        `image` is (B,C,H,W) reflectance, `physical` (B,P,H,W), `scene` (B,S).
        """
        image, cells = batch["image"], None
        losses: dict[str, Tensor] = {}
        if self.objective.masked:
            cells = draw_cells(image, self.unit, self.objective.mask_ratio)
        tokens, student = self.encode(image, cells)
        if cells is not None:
            losses["masked"] = masked_l1(
                self.paint(tokens),
                self.backbone.normalised(image),
                enlarged(cells, self.unit),
            )
        if self.projector is not None:
            wanted = self.teachers[0](image)
            losses["teacher"] = feature_loss(self.projector(student), wanted)
        if self.physical is not None:
            losses["physical"] = _physical_loss(self.physical, tokens, batch)
        if self.scene is not None:
            facts = self.scene(tokens.mean((2, 3)))
            losses["scene"] = known_error(facts, batch["scene"])
        return losses

    def encode(self, image: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last map (B,D,h,w) of an image, and the pooled features of the stage.

        `cells` is from `draw_cells`; None hides nothing.
        """
        with ExitStack() as stack:
            found = stack.enter_context(
                stage_features(self.backbone, self.objective.stage)
            )
            if cells is not None:
                hide = hidden_tokens(self.backbone, cells, self.unit, self.mask_token)
                stack.enter_context(hide)
            tokens = self.backbone(image)[-1]
        return tokens, found[0]

    def paint(self, tokens: Tensor) -> Tensor:
        """The last map (B,D,h,w) -> normalised pixels (B,C,H,W), one linear layer."""
        pixels = self.pixels(tokens.permute(0, 2, 3, 1))  # (B, h, w, C * s * s)
        return F.pixel_shuffle(pixels.permute(0, 3, 1, 2), self.stride)

    def configure_optimizers(self) -> Any:
        """AdamW and cosine as in SimMIM; vectors and position tables do not decay."""
        groups: dict[float, list[nn.Parameter]] = {0.05: [], 0.0: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                table = "relative_position_bias_table" in name or "pos_embed" in name
                still = parameter.ndim <= 1 or table
                groups[0.0 if still else 0.05].append(parameter)
        optimiser = torch.optim.AdamW(
            [{"params": p, "weight_decay": d} for d, p in groups.items()],
            lr=self.learning_rate,
        )
        scheduler = CosineLRScheduler(
            optimiser,
            t_initial=self.total_steps,
            lr_min=LAST_RATE * self.learning_rate,
            warmup_lr_init=FIRST_RATE * self.learning_rate,
            warmup_t=int(WARMUP * self.total_steps),
            t_in_epochs=False,
        )
        return [optimiser], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Tell timm's scheduler which step it is."""
        scheduler.step_update(num_updates=self.global_step)


def known_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error where `target` is not NaN; 0 where all of it is."""
    known = torch.isfinite(target)
    error = torch.where(known, output - target, 0.0).square()
    return error.sum() / known.sum().clamp(min=1)


def _physical_loss(
    head: nn.Linear, tokens: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    height, width = tokens.shape[2:]
    # maps may come at a coarser grid than the image, so they are pooled by ratio
    cells = F.adaptive_avg_pool2d(batch["physical"], (2 * height, 2 * width))
    target = F.pixel_unshuffle(cells, 2).permute(0, 2, 3, 1)  # (B, h, w, 4P)
    return known_error(head(tokens.permute(0, 2, 3, 1)), target)


def _unit(backbone: Backbone, objective: Objective) -> int:
    unit, patch = objective.mask_unit or backbone.strides[-1], backbone.strides[0]
    if unit < 1 or unit % patch:
        raise ValueError(
            f"mask_unit is {unit} px; it must be a multiple of the patch, {patch} px."
        )
    return unit
