"""`pretrain`: make or continue a foundation model without task labels.

Three objectives share one backbone: masked image modelling, dense physical maps (cover
fractions, height above the river, slope) where the data knows them, and facts about
the whole scene (place, climate, season, haze). A prototype's short run of masked
modelling alone was worse than random weights; the dense maps make a small budget pay.
Taught in notebook 10.

Sources: SimMIM, Xie et al. 2022 (arXiv 2111.09886), for masked tokens inside the full
sequence and a linear decoder; PhilEO, Fibaek et al. 2024 (arXiv 2401.04464), for
geo-aware heads. The mix is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.backbones.grouped import GroupedViTBackbone
from geopeft_kit.training.callbacks import Checkpoint
from geopeft_kit.training.fit import quiet_lightning
from geopeft_kit.training.hardware import choose_device, choose_precision
from geopeft_kit.training.task import cosine_with_warmup


@dataclass(frozen=True)
class Objective:
    """How much each part of the pretext task counts; 0 leaves a part out.

    Attributes:
        masked: Reconstruction of masked patches, normalised reflectance.
        physical: Dense maps, `physical` (P,H,W) in the samples, NaN where unknown.
        scene: Facts about the scene, `scene` (S,) in the samples, NaN where unknown.
        mask_ratio: Share of patches hidden from the backbone.
    """

    masked: float = 1.0
    physical: float = 10.0
    scene: float = 1.0
    mask_ratio: float = 0.4


class PretextTask(L.LightningModule):
    """A ViT backbone with a mask token and one linear head per objective.

    Args:
        backbone: A ViT; all its weights train.
        objective: The weights of the losses.
        physical: Number P of dense maps in the samples.
        scene: Number S of scene facts in the samples.
        learning_rate: Peak rate of AdamW.
        total_steps: For warm-up and cosine.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        physical: int,
        scene: int,
        learning_rate: float,
        total_steps: int,
    ) -> None:
        super().__init__()
        if backbone.layout != "vit" or backbone.width is None:
            raise ValueError(
                f"masked modelling is written for ViTs; {backbone.card.name!r} is a "
                f"{backbone.layout}. Take a backbone whose layout is 'vit'."
            )
        if isinstance(backbone, GroupedViTBackbone):
            raise ValueError(
                f"masked modelling hides one token per patch; {backbone.card.name!r} "
                "makes several. Take a plain ViT."
            )
        self.backbone = backbone
        self.objective = objective
        self.patch = backbone.strides[-1]
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        width = backbone.width
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.pixels = nn.Linear(width, len(backbone.bands) * self.patch**2)
        # 2 x 2 cells of every dense map for each token
        self.physical = nn.Linear(width, 4 * physical) if physical else None
        self.scene = nn.Linear(width, scene) if scene else None

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        image = batch["image"]
        grid = (
            image.shape[0],
            image.shape[2] // self.patch,
            image.shape[3] // self.patch,
        )
        mask = torch.rand(grid, device=image.device) < self.objective.mask_ratio
        with self._masked_tokens(mask):
            tokens = self.backbone(image)[-1].permute(0, 2, 3, 1)  # (B,h,w,D)
        losses = {"masked": self._masked_loss(tokens, image, mask)}
        if self.physical is not None:
            losses["physical"] = self._physical_loss(
                self.physical, tokens, batch["physical"]
            )
        if self.scene is not None:
            losses["scene"] = known_error(
                self.scene(tokens.mean((1, 2))), batch["scene"]
            )
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return sum(
            getattr(self.objective, name) * loss for name, loss in losses.items()
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        factor = cosine_with_warmup(self.total_steps, self.total_steps // 20)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @contextmanager
    def _masked_tokens(self, mask: Tensor) -> Iterator[None]:
        """Put the mask token in place of the masked patches' embeddings."""

        def replace(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            hidden = mask.reshape(tokens.shape[:-1]).unsqueeze(
                -1
            )  # (B,N,1) or (B,h,w,1)
            return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)

        handle = self.backbone.module("patch_embed").register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def _masked_loss(self, tokens: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        target = F.pixel_unshuffle(self.backbone.normalised(image), self.patch)
        target = target.permute(0, 2, 3, 1)  # (B,h,w,C*p*p)
        # absolute, as in SimMIM: a cloud is ten spreads bright and would rule a square
        error = (self.pixels(tokens) - target).abs().mean(-1)  # (B,h,w)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def _physical_loss(
        self, head: nn.Linear, tokens: Tensor, physical: Tensor
    ) -> Tensor:
        height, width = tokens.shape[1:3]
        # maps may come at a coarser grid than the image, so they are pooled by ratio
        cells = F.adaptive_avg_pool2d(physical, (2 * height, 2 * width))  # (B,P,2h,2w)
        target = F.pixel_unshuffle(cells, 2).permute(0, 2, 3, 1)  # (B,h,w,4P)
        return known_error(head(tokens), target)


class SizedSamples(Protocol):
    """A data set that knows its length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


def known_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error where `target` is not NaN; 0 where all of it is."""
    known = torch.isfinite(target)
    error = torch.where(known, output - target, 0.0).square()
    return error.sum() / known.sum().clamp(min=1)


def pretrain(
    backbone: Backbone,
    data: SizedSamples,
    steps_per_epoch: int,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    objective: Objective | None = None,
    precision: str = "auto",
    device: str = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
) -> pd.DataFrame:
    """Pretrain a ViT backbone in place.

    Args:
        backbone: A ViT; all its weights train.
        data: Samples with `image` (C,H,W) reflectance and, where known, `physical`
            (P,H,W) and `scene` (S,) scaled to about unit spread, NaN where unknown.
        steps_per_epoch: Optimiser steps between two checkpoints.
        epochs: How many such stretches.
        batch_size: Samples a step.
        learning_rate: Peak rate.
        objective: The parts of the pretext task.
        precision: As in `fit`.
        device: As in `fit`.
        seed: Order of the samples and masks.
        folder: Where a checkpoint is written after each epoch.
        resume: Go on from it, with the same schedule.

    Returns:
        The log, one row an epoch: loss of each part, samples seen, seconds.

    Raises:
        ValueError: The backbone is no ViT.
        FileNotFoundError: `resume=True` without a checkpoint.
    """
    place = choose_device(device)
    sample = data[0]
    torch.manual_seed(seed)
    task = PretextTask(
        backbone,
        objective or Objective(),
        physical=len(sample["physical"]) if "physical" in sample else 0,
        scene=len(sample["scene"]) if "scene" in sample else 0,
        learning_rate=learning_rate,
        total_steps=steps_per_epoch * epochs,
    )
    log = _Log(seed)
    callbacks: list[L.Callback] = [log]
    checkpoint = Path(folder) / "last.ckpt" if folder is not None else None
    if checkpoint is not None:
        callbacks.append(Checkpoint(checkpoint))
        if resume and not checkpoint.exists():
            raise FileNotFoundError(
                f"{checkpoint} does not exist, so there is nothing to resume. Start "
                "with resume=False."
            )
    sampler = _Draws(len(data), steps_per_epoch * batch_size, seed)
    backbone.train()
    with quiet_lightning():
        trainer = L.Trainer(
            accelerator="gpu" if place.type == "cuda" else "cpu",
            devices=1,
            precision=choose_precision(precision, place),
            max_epochs=epochs,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # A generator of its own: making an iterator would draw from the masks' state.
        own = torch.Generator().manual_seed(seed)
        loader: DataLoader = DataLoader(
            data,  # type: ignore[arg-type]
            batch_size,
            sampler=sampler,
            generator=own,
        )
        resume_from = str(checkpoint) if resume else None
        trainer.fit(task, loader, ckpt_path=resume_from, weights_only=True)
    backbone.eval()
    return pd.DataFrame(log.rows)


def save_weights(backbone: Backbone, path: str | Path, half: bool = True) -> Path:
    """Write the backbone's plain weights as safetensors that `load_backbone` reads.

    Args:
        backbone: Any backbone; no adapter may be active.
        path: The file.
        half: Store as float16, half the size.

    Returns:
        The path written.
    """
    dtype = torch.float16 if half else torch.float32
    state = backbone.model.state_dict()
    save_file({k: v.to(dtype).contiguous() for k, v in state.items()}, str(path))
    return Path(path)


class _Draws(Sampler):
    """`count` samples an epoch, drawn with replacement from (seed, epoch) alone."""

    def __init__(self, size: int, count: int, seed: int) -> None:
        self.size, self.count, self.seed, self.epoch = size, count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        return iter(random.integers(self.size, size=self.count).tolist())


class _Log(L.Callback):
    """One row an epoch; seeds each epoch so that a resumed run draws the same masks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)
        self.losses: list[dict[str, Tensor]] = []
        self.samples = 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        self.losses.append(pl_module.losses)
        self.samples += len(batch["image"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row["samples"] = self.samples * row["epoch"]
        for name in self.losses[0]:
            row[name] = float(torch.stack([step[name] for step in self.losses]).mean())
        self.rows.append(row)
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
