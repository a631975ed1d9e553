"""Distillation: the student's features turn towards those of a frozen teacher.

Both sides are read after one of four stages, averaged over all places, and compared by
their angle. Student: the masked image. Teacher: the whole image, at the teacher's own
size.

Source: GFM, Mendieta et al. 2023 (arXiv 2302.04476), eq. 3 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.backbones.base import Backbone, tap_points

STAGES = (1, 2, 3, 4)


class _StageReached(Exception):
    """What is deeper than the stage need not be computed."""


def stage_path(backbone: Backbone, stage: int) -> str:
    """The end of a stage, 1 to 4, as a path inside `backbone.model`.

    A Swin's stage ends behind the merging that follows it, before the next stage's
    blocks (so stage 3 of Swin-B has 1,024 channels); no norm is applied. A ViT's stages
    are quarters of its depth.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; allowed are 1, 2, 3 and 4.")
    if backbone.layout == "swin":
        return "layers.3" if stage == 4 else f"layers.{stage}.downsample"
    if backbone.layout == "vit":
        paths = backbone.block_paths
        return paths[tap_points(len(paths))[stage - 1]]
    raise ValueError(
        f"features of a stage are read from plain ViTs and Swins; "
        f"{backbone.card.name!r} is a {backbone.layout}."
    )


def stage_width(backbone: Backbone, stage: int) -> int:
    """Channels of `stage_features`: of a Swin twice those of the stage's own map."""
    stage_path(backbone, stage)  # its errors
    if backbone.width is not None:  # of a ViT; its maps may be those of a neck
        return backbone.width
    return backbone.channels[min(stage, 3)]


@contextmanager
def stage_features(
    backbone: Backbone, stage: int, stop: bool = False
) -> Iterator[list[Tensor]]:
    """Collect the features of a stage in every forward pass made inside.

    Yields a list; every pass adds (B, D), the mean over all places. With `stop` the
    forward pass ends there and returns nothing.
    """
    found: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        tokens = output.flatten(1, -2)  # (B, N, D), from (B, h, w, D) or (B, N, D)
        if backbone.layout == "vit":  # prefix tokens and prompts stand first
            grid = backbone.grid
            tokens = tokens[:, -grid.height * grid.width * grid.groups :]
        found.append(tokens.mean(1))
        if stop:
            raise _StageReached

    handle = backbone.module(stage_path(backbone, stage)).register_forward_hook(catch)
    try:
        yield found
    except _StageReached:
        pass
    finally:
        handle.remove()


class Teacher:
    """A frozen backbone that is asked for the features of one stage.

    Not a module on purpose: inside the student's module it would train and be saved. It
    picks its own bands from the images' `bands` by name, and raises ValueError if one
    is missing.
    """

    def __init__(self, backbone: Backbone, bands: Sequence[str], stage: int) -> None:
        missing = [band for band in backbone.bands if band not in bands]
        if missing:
            raise ValueError(
                f"the teacher {backbone.card.name!r} needs {', '.join(missing)}; the "
                f"images have {', '.join(bands)}. Load it with bands=[...] of these."
            )
        self.backbone = backbone.eval()
        self.channels = [list(bands).index(band) for band in backbone.bands]
        self.stage = stage
        self.width = stage_width(backbone, stage)

    def to(self, device: torch.device) -> None:
        """Move to where the images are."""
        self.backbone.to(device)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) reflectance, nothing hidden -> (B, D)."""
        image = image[:, self.channels]
        side = self.backbone.image_size
        if image.shape[-2:] != (side, side):
            image = F.interpolate(
                image, (side, side), mode="bilinear", align_corners=True
            )
        with stage_features(self.backbone, self.stage, stop=True) as found:
            self.backbone(image)
        return found[0]


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Minus the cosine between features (B, D), batch mean, -1 to 1; eq. 3 of GFM.

    No gradient flows to the teacher.
    """
    return -F.cosine_similarity(student, teacher.detach(), dim=1).mean()
