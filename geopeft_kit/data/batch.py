"""What a batch holds: images, their date and place, and the target.

A batch is torchgeo's dict: `image` (B, C, H, W) or (B, C, 2, H, W), `mask` or `label`,
`region`, and optionally `date` (B, T, 2) and `lonlat` (B, 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from geopeft_kit.devices import moved


def batch_target(batch: Mapping[str, Any]) -> Tensor:
    """The mask of a batch, or its label where the data has labels."""
    return batch["mask"] if "mask" in batch else batch["label"]


def batch_meta(batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Date and place of a batch as backbones take them; None where it has neither."""
    meta = {key: batch[key] for key in ("date", "lonlat") if key in batch}
    return meta or None


def images_on(
    batch: Mapping[str, Any], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Images of a batch, and their date and place, on a device."""
    return moved((batch["image"], batch_meta(batch)), device)
