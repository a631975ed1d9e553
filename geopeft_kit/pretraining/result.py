"""What a pretraining run leaves: history, cost, a look at paintings, and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from geopeft_kit.devices import device_of, moved
from geopeft_kit.pretraining.masking import draw_cells, enlarged
from geopeft_kit.pretraining.task import PretextTask
from geopeft_kit.training.tracker import Resources


@dataclass
class Pretraining:
    """What a pretraining run leaves behind.

    Attributes:
        task: Backbone and heads as they ended.
        history: One row an epoch: samples seen, and the mean of each loss.
        resources: Time and memory, see `Resources`; None where a resumed run had no
            step left.
        seconds: Of this call; a resumed run counts from its resume.
        watt_hours: Of the GPUs in this call; None is "not measured".
        weights: The file that `load_backbone` reads; None without a folder, or where an
            adapter trained: that is saved by `adapter.save`.
    """

    task: PretextTask
    history: pd.DataFrame
    resources: Resources | None
    seconds: float
    watt_hours: float | None
    weights: Path | None = None

    def cost(self) -> dict[str, Any]:
        """Minutes, memory and energy, as one row of a table."""
        cost: dict[str, Any] = {"minutes": self.seconds / 60}
        if self.resources is not None:
            cost |= {
                "ms a step": self.resources.step_ms,
                "peak MiB": self.resources.peak_mib,
                "activations MiB": self.resources.activations_mib,
            }
        energy = self.watt_hours
        return cost | {"energy Wh": "not measured" if energy is None else energy}

    @torch.no_grad()
    def reconstruct(
        self, image: Tensor, mask_ratio: float | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Hide a part of images and let the network paint it.

        Args:
            image: (B, C, H, W) reflectance.
            mask_ratio: Share to hide; None is that of training.
            seed: Of the cells that are hidden.

        Returns:
            What is hidden, (B, H, W) bool, and the painted images, (B, C, H, W)
            reflectance: all of them painted, the visible cells too. Both are on the
            CPU.

        Raises:
            ValueError: `mask_ratio` is no share.
        """
        task = self.task
        ratio = task.objective.mask_ratio if mask_ratio is None else mask_ratio
        if not 0 <= ratio <= 1:
            raise ValueError(f"mask_ratio is {ratio}; it is a share from 0 to 1.")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            cells = draw_cells(image.cpu(), task.unit, ratio)
        tokens, _ = task.encode(*moved((image, cells), device_of(task)))
        painted = task.paint(tokens)
        return enlarged(cells, task.unit), task.backbone.reflectance(painted).cpu()
