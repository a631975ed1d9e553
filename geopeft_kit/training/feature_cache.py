"""Feature cache: a frozen backbone needs to see each image only once.

With nothing trainable in the backbone and no augmentation, every epoch would compute
the same feature maps again. `FeatureCache` computes them once and serves them as a data
set, so that later epochs cost the decoder alone. Taught in notebook 02.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from geopeft_kit.model import Model
from geopeft_kit.training.task import batch_meta


class FeatureCache(Dataset):
    """Feature maps of a data set, held in memory, with the targets beside them.

    Args:
        model: The model whose `features` are kept; put into eval mode meanwhile, so
            that dropout and batch statistics play no part.
        loader: Batches in a fixed order, without augmentation.
        device: Where to compute; the maps are kept in main memory.
        limit_mib: The largest cache allowed.

    Raises:
        MemoryError: The maps would exceed `limit_mib`, known after the first batch.
    """

    def __init__(
        self,
        model: Model,
        loader: DataLoader,
        device: torch.device | str = "cpu",
        limit_mib: float = 4096,
    ) -> None:
        self.samples: list[dict[str, Any]] = []
        self.size: tuple[int, int] = (0, 0)
        total = len(loader.dataset)  # type: ignore[arg-type]
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                for batch in loader:
                    self._append(model, batch, device)
                    if len(self.samples) == len(batch["region"]):
                        _check_room(self.samples, total, limit_mib)
        finally:
            model.train(training)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    @property
    def maps(self) -> list[Tensor]:
        """Each level's maps of the whole data set, (N, C_i, h, w)."""
        levels = zip(*(sample["features"] for sample in self.samples), strict=True)
        return [torch.stack(level) for level in levels]

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of cached maps, with the image size that outputs are made for."""
        batch = default_collate(samples)
        batch["size"] = self.size
        return batch

    def _append(self, model: Model, batch: Mapping[str, Any], device: Any) -> None:
        maps = batch_features(model, batch, device)
        self.size = tuple(batch["image"].shape[-2:])
        target = "mask" if "mask" in batch else "label"
        for index, region in enumerate(batch["region"]):
            self.samples.append(
                {
                    # clone() leaves inference mode's tensors behind, and the batch
                    # that each would otherwise keep alive
                    "features": [m[index].to("cpu").clone() for m in maps],
                    target: batch[target][index],
                    "region": region,
                }
            )


def batch_features(
    model: Model, batch: Mapping[str, Any], device: torch.device | str
) -> list[Tensor]:
    """Return the feature maps of a batch's images, computed on a device."""
    meta = batch_meta(batch)
    if meta is not None:
        meta = {key: value.to(device) for key, value in meta.items()}
    return model.features(batch["image"].to(device), meta)


def _check_room(samples: list[dict[str, Any]], total: int, limit_mib: float) -> None:
    sizes = (m.numel() * m.element_size() for s in samples for m in s["features"])
    needed = sum(sizes) / len(samples) * total / 2**20
    if needed > limit_mib:
        raise MemoryError(
            f"the feature maps of {total} images need {needed:.0f} MiB, and the cache "
            f"is allowed {limit_mib:.0f}. Pass cache_features=False to fit, or a "
            "smaller data set."
        )
