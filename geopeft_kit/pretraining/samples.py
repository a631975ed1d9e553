"""What pretraining reads: images without labels, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from geopeft_kit.data.chips import ChipData, ChipDataset

KEYS = ("image", "physical", "scene")


class SizedSamples(Protocol):
    """A data set that knows its length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


def corpus(data: ChipData) -> ChipDataset:
    """The training chips, or all chips of a data set without labels."""
    alone = "unlabelled" in data.splits and "train" not in data.splits
    return data.dataset("unlabelled" if alone else "train")


class Samples(Dataset):
    """The images of a data set, and dense maps and scene facts where it has them.

    `data` and `crop` (pixels) are those of `pretrain`; crops have sides of 3:4 to 4:3.
    Raises TypeError or ValueError for data that cannot be learnt from, at once or when
    a sample is read.
    """

    def __init__(self, data: ChipData | SizedSamples, crop: int | None = None) -> None:
        if isinstance(data, ChipData):
            data = corpus(data)
        self.data: Any = data
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"data is a {type(data).__name__}; pretrain takes a ChipData, or "
                'samples: len(data), and data[i] a dict with "image" (C, H, W).'
            )
        if not len(self.data):
            raise ValueError("data holds no sample. Give it one image at least.")
        self.first = self.data[0]
        if not isinstance(self.first, Mapping) or "image" not in self.first:
            raise TypeError(
                f'data[0] is no dict with "image" (C, H, W): {type(self.first)}.'
            )
        if self.first["image"].ndim != 3:
            raise ValueError(
                f"images have shape {tuple(self.first['image'].shape)}; pretraining "
                "takes one date, (C, H, W)."
            )
        if crop and "physical" in self.first:
            raise ValueError(
                "crop cuts images alone, but these samples have dense maps as well. "
                "Cut both in the data set, and leave crop out."
            )
        self.view = None if crop is None else _random_view(crop)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.data[index]
        keys = [key for key in KEYS if key in self.first]
        lacking = [key for key in keys if key not in sample]
        if lacking:
            raise ValueError(
                f"sample {index} has no {lacking[0]!r}, and the first one has. Fill it "
                "with NaN where nothing is known."
            )
        kept = {key: sample[key] for key in keys}
        if not torch.isfinite(kept["image"]).all():
            raise ValueError(
                f"image {index} holds NaN or infinite values, which would spread to "
                "every weight. Fill them, or leave the image out."
            )
        if self.view is not None:
            kept["image"] = self.view(kept["image"])
        return kept

    def length(self, key: str) -> int:
        """Number of dense maps or scene facts in a sample; 0 where there are none."""
        return len(self.first[key]) if key in self.first else 0


def _random_view(side: int) -> Any:
    """GFM's augmentation; it draws from PyTorch's own random state."""
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop((side, side), scale=(0.67, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


class Draws(Sampler):
    """The samples of an epoch, drawn from (seed, epoch) alone; each rank has its own.

    `batch` counts samples per step and device. `steps` per epoch are drawn with
    replacement; None is one pass in a new order, without the last samples that fill no
    step.
    """

    def __init__(
        self, size: int, batch: int, ranks: int, steps: int | None, seed: int
    ) -> None:
        self.size, self.seed, self.ranks, self.epoch = size, seed, ranks, 0
        self.again = steps is not None
        whole = max(1, size // (batch * ranks))
        self.steps = whole if steps is None else steps
        self.count = self.steps * (batch if self.again else min(batch, size))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        rank = dist.get_rank() if dist.is_initialized() else 0
        total = self.count * self.ranks
        if self.again:
            drawn = random.integers(self.size, size=total)
        else:
            drawn = np.resize(random.permutation(self.size), total)
        return iter(drawn[rank :: self.ranks].tolist())
