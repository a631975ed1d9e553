"""One batch on its way through a training step, an evaluation or a cache.

Loaders yield torchgeo's dicts: `image`, `mask` or `label`, `region`, and optionally
`date` (B, T, 2) and `lonlat` (B, 2). Everything behind them reads a `Batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from geopeft_kit.devices import moved


class Batch(NamedTuple):
    """Images, or what was cached of them, with the target.

    Attributes:
        image: (B, C, H, W) or (B, C, 2, H, W) reflectance 0-1; None beside `features`.
        target: Masks or labels of the task; None without labels.
        meta: "date" (B, T, 2) and "lonlat" (B, 2) where known, or None.
        region: Region name of each image.
        features: Cached maps, each (B, C_i, h, w), or None.
        size: (H, W) of the images, pixels.
    """

    image: Tensor
    target: Tensor
    meta: dict[str, Tensor] | None
    region: list[str]
    features: list[Tensor] | None
    size: tuple[int, int]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Self:
        """Read a loader's dict; one of cached features carries its `size`."""
        image: Any = batch.get("image")
        target: Any = batch.get("mask", batch.get("label"))
        size = batch["size"] if image is None else tuple(image.shape[-2:])
        meta = {key: batch[key] for key in ("date", "lonlat") if key in batch}
        return cls(
            image=image,
            target=target,
            meta=meta or None,
            region=batch.get("region", []),
            features=batch.get("features"),
            size=size,
        )

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device."""
        return type(self)(*moved(self, device))
