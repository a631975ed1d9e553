"""The highest memory of this process, as the GPU's allocator or Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Peak memory of this process from `start()` on: GPU allocator or resident set.

    On Linux the kernel's own high-water mark is reset and read, so no peak between two
    samples is missed. Elsewhere the resident set is read at each call of `sample()`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        self.highest = 0

    def start(self) -> None:
        """Forget earlier peaks and note what is in use now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.floor = torch.cuda.memory_allocated(self.device)
            return
        _return_free_pages()
        _reset_high_water_mark()
        self.floor = self.highest = self.process.memory_info().rss

    def sample(self) -> None:
        """Take the present resident set into account (needed without a kernel mark)."""
        if self.device.type != "cuda":
            self.highest = max(self.highest, self.process.memory_info().rss)

    def peak(self) -> int:
        """The highest number of bytes since `start()`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self.sample()
        return max(self.highest, _high_water_mark())


def _return_free_pages() -> None:
    """Hand freed heap pages back, or an earlier run would count in this run's floor."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _reset_high_water_mark() -> None:
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        try:
            mark.write_text("5")
        except PermissionError:
            # Hardened containers forbid it; `PeakMemory.sample` still sees each step.
            return


def _high_water_mark() -> int:
    """Peak resident set in bytes since the last reset; 0 where there is no such mark.

    A mark that could not be reset would report an older peak, so it is only read where
    resetting is allowed.
    """
    status = Path("/proc/self/status")
    if not status.exists() or not _can_reset():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _can_reset() -> bool:
    try:
        with open("/proc/self/clear_refs", "w"):
            return True
    except OSError:
        return False
