"""What the machine can do: its device, precision, free memory and peak of memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device to compute on: "auto" (a GPU if there is one), "cpu" or "cuda".

    A device of PyTorch is taken as it is. Raises ValueError for another name, or "cuda"
    on a machine without a GPU.
    """
    if isinstance(device, torch.device):
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed are 'auto', 'cpu' and 'cuda'.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError(
            "device='cuda', but PyTorch sees no GPU here. Pass device='auto', or check "
            "the driver with `nvidia-smi` and the build with torch.version.cuda."
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def choose_precision(
    precision: str, device: torch.device, frozen_precision: str | None = None
) -> Any:
    """Lightning's name of the precision to train in; ValueError if the device lacks it.

    "auto" is bf16 on GPUs that have it in hardware, 16-bit with loss scaling on older
    ones (a T4 emulates bf16, slowly), and 32-bit on a CPU, where results repeat
    exactly. With `frozen_precision` it is bf16: no other precision uses such weights.
    """
    allowed = ("auto", "32-true", "bf16-mixed", "16-mixed")
    if precision not in allowed:
        raise ValueError(
            f"precision is {precision!r}; allowed are {', '.join(allowed)}."
        )
    if precision == "auto" and frozen_precision is not None:
        precision = "bf16-mixed"
    if device.type != "cuda":
        if precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' needs a GPU. On a CPU choose '32-true' or "
                "'bf16-mixed'."
            )
        return "32-true" if precision == "auto" else precision
    if precision == "bf16-mixed" and not has_bf16(device):
        leave = "frozen_precision=None and " if frozen_precision else ""
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bf16 in hardware. Choose "
            f"{leave}precision='16-mixed' or '32-true'."
        )
    return mixed_precision(device.type) if precision == "auto" else precision


def mixed_precision(device: str = "auto") -> str:
    """The mixed precision that a device computes in hardware, as `fit` takes it.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Returns:
        "bf16-mixed"; "16-mixed" on a GPU without bf16, such as a T4. A CPU has
        "bf16-mixed" alone, and gains time only with matrix units for it (AMX).
    """
    place = choose_device(device)
    lacking = place.type == "cuda" and not has_bf16(place)
    return "16-mixed" if lacking else "bf16-mixed"


def autocast(precision: str, device: str) -> torch.autocast:
    """A context that computes in a precision of `choose_precision`, as Lightning."""
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device, low, enabled=low is not None)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed in hardware there, as far as it says so."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_cpu_flags()))


def free_gib(device: torch.device) -> float:
    """GiB that can still be taken: of the GPU, or of this machine or container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return (free + reserved - torch.cuda.memory_allocated(device)) / 2**30
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), psutil.Process().memory_info().rss
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - used)  # a container's own limit
    return max(0, free) / 2**30


def _cpu_flags() -> list[str]:
    """The processor's abilities as Linux names them; empty elsewhere."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return next(named, "").split()


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
        self.has_mark = _reset_high_water_mark()
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
        return max(self.highest, _high_water_mark() if self.has_mark else 0)


def _return_free_pages() -> None:
    """Return freed heap pages, or an earlier run would count in this run's floor."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _reset_high_water_mark() -> bool:
    """Whether Linux forgot the peak so far; hardened containers forbid it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or forbidden: `PeakMemory.sample` still sees each step
        return False
    return True


def _high_water_mark() -> int:
    """Peak resident set in bytes since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(li.split()[1]) for li in lines if li.startswith("VmHWM"))
