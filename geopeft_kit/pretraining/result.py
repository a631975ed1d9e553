"""What a pretraining run leaves: history, cost, reconstructions, and weights.

Energy is read from the GPUs' own counters: NVIDIA's library (NVML) counts millijoules
since the driver was loaded. Its Python binding is the package `nvidia-ml-py`, which
`geopeft-kit[energy]` brings. A CPU has no such counter that every user may read, so
there it is "not measured".
"""

from __future__ import annotations

import importlib
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
        task: Backbone and heads after training.
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
        """Hide a part of images and let the network reconstruct it.

        Args:
            image: (B, C, H, W) reflectance.
            mask_ratio: Share to hide; None is that of training.
            seed: Of the cells that are hidden.

        Returns:
            What is hidden, (B, H, W) bool, and the reconstruction, (B, C, H, W)
            reflectance, of visible cells too. Both are on the CPU.

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


class EnergyMeter:
    """Energy of this machine's GPUs that a run uses, from `start` on."""

    def __init__(self, devices: list[int]) -> None:
        self.devices = devices
        self.began: float | None = None

    def start(self) -> None:
        """Note where the counters stand."""
        self.began = self._counted()

    def watt_hours(self) -> float | None:
        """Energy since `start`; None where it is not measured."""
        now = self._counted()
        if now is None or self.began is None:
            return None
        return (now - self.began) / 3.6e6  # 3.6e6 millijoules are a watt-hour

    def _counted(self) -> float | None:
        """Millijoules of all devices since the driver was loaded."""
        if not self.devices:
            return None
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            handles = [self._handle(nvml, device) for device in self.devices]
            return float(sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, handles)))
        except nvml.NVMLError:  # no driver, no permission, or older than Volta
            return None

    @staticmethod
    def _handle(nvml: Any, device: int) -> Any:
        # CUDA_VISIBLE_DEVICES renumbers for PyTorch alone, so the device goes by UUID
        uuid = torch.cuda.get_device_properties(device).uuid
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
