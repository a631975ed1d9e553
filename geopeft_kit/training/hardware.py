"""What the machine can do: the device, and the precision it truly supports."""

from __future__ import annotations

from typing import Any

import torch


def choose_device(device: str = "auto") -> torch.device:
    """The device to compute on.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: Another name, or "cuda" on a machine without a GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed are 'auto', 'cpu' and 'cuda'.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError(
            "device='cuda', but PyTorch sees no GPU here. Pass device='auto', or check "
            "the driver with `nvidia-smi` and the build with torch.version.cuda."
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def choose_precision(precision: str, device: torch.device) -> Any:
    """Lightning's name of the precision to train in.

    "auto" is bf16 on GPUs that have it in hardware, 16-bit with loss scaling on older
    ones (a T4 emulates bf16, slowly), and 32-bit on a CPU, where results are exact to
    repeat.

    Args:
        precision: "auto", "32-true", "bf16-mixed", "16-mixed".
        device: Where the training runs.

    Raises:
        ValueError: The hardware does not support the precision asked for.
    """
    allowed = ("auto", "32-true", "bf16-mixed", "16-mixed")
    if precision not in allowed:
        raise ValueError(
            f"precision is {precision!r}; allowed are {', '.join(allowed)}."
        )
    if device.type != "cuda":
        if precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' needs a GPU. On a CPU choose '32-true' or "
                "'bf16-mixed'."
            )
        return "32-true" if precision == "auto" else precision
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16-mixed" and not has_bf16:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bf16 in hardware. Choose "
            "'16-mixed' or '32-true'."
        )
    if precision == "auto":
        return "bf16-mixed" if has_bf16 else "16-mixed"
    return precision
