"""Energy that the GPUs took, read from their own counters.

NVIDIA's library (NVML) counts millijoules since the driver was loaded; the Python
binding is the package `nvidia-ml-py`, which `geopeft-kit[energy]` brings. A CPU has no
such counter that every user may read, so there it is "not measured", and no number is
made up.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch


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
