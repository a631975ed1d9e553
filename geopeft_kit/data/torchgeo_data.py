"""torchgeo's data sets and data modules, as `fit` and `evaluate` take them.

    gk.fit(model, EuroSAT100(root, transforms=scaled))      # as it is
    gk.fit(model, gk.TorchgeoData(OSCDDataModule(...), task="change", scale=1e-4))

`gk.fit` wraps whatever is not `SplitData` itself. Values are taken as they are unless a
scale is given: images are meant to be reflectance from 0 to 1. torchgeo's own
normalisation and augmentation run inside its trainer and are not used here, since a
backbone normalises by its card.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from geopeft_kit.data.info import CLASS_TASKS, TASKS
from geopeft_kit.data.split_data import SplitData

if TYPE_CHECKING:
    from torchgeo.datasets import GeoDataset

SPLITS = ("train", "val", "test")
BRIGHTEST = 20.0  # reflectance never comes near; stored numbers are above


class TorchgeoData(SplitData):
    """A torchgeo data set or data module, used as a `ChipData` is.

    Args:
        source: A data set (it trains), a mapping from split to data set, or a data
            module, which is prepared here. A `GeoDataset` comes as a `DataLoader` with
            the sampler that picks its patches.
        task: "segmentation", "regression", "classification", "multilabel", "change",
            "super_resolution" (the mask is the finer image).
        num_classes: K; not needed for regression; bands for super-resolution.
        scale: Factor from stored values to reflectance.
        ignore_index: Mask value without a label.
        batch_size: Samples in a batch.
        num_workers: Processes that read.
        seed: Of the order in training.

    Raises:
        ValueError: An unknown task or split, or a source without a training set.
    """

    def __init__(
        self,
        source: Source | L.LightningDataModule,
        task: str,
        num_classes: int | None = None,
        scale: float = 1.0,
        ignore_index: int = 255,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        allowed = (*TASKS, "super_resolution")
        if task not in allowed:
            raise ValueError(f"task is {task!r}; allowed are {', '.join(allowed)}.")
        if num_classes is None and task in (*CLASS_TASKS, "super_resolution"):
            raise ValueError(f"task {task!r} needs num_classes, how many there are.")
        self.task, self.scale, self.ignore_index = task, scale, ignore_index
        self.num_classes = num_classes or 1
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.sets = _split_sets(source)
        self.name = type(source).__name__
        self.warned = False

    @property
    def splits(self) -> list[str]:
        return list(self.sets)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first training sample."""
        height, width = self.dataset("train")[0]["image"].shape[-2:]
        return int(height), int(width)

    def dataset(self, split: str) -> Any:
        """Torchgeo's own data set of a split."""
        if split not in self.sets:
            raise ValueError(
                f"{self.name} has no split {split!r}; it has {', '.join(self.sets)}. "
                "Pass a data module, or {'train': ..., 'val': ..., 'test': ...}."
            )
        return self.sets[split]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Torchgeo's samples, dicts with `image` and `mask` or `label`, as a batch."""
        key = "label" if self.task in ("classification", "multilabel") else "mask"
        for name in ("image", key):
            if name not in samples[0]:
                raise ValueError(
                    f"samples of {self.name} hold {', '.join(samples[0])}; task "
                    f"{self.task!r} needs {name!r}. Choose the task that fits."
                )
        shapes = {tuple(sample["image"].shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(
                f"images of {self.name} have the shapes {sorted(shapes)}, which cannot "
                "share a batch. Give the data set a transform that resizes them."
            )
        image = torch.stack([s["image"] for s in samples]).float() * self.scale
        if self.task == "change":
            image = image.transpose(1, 2)  # (B,2,C,H,W) -> (B,C,2,H,W)
        self._check_range(image)
        target = default_collate([torch.as_tensor(s[key]) for s in samples])
        regions = ["everywhere"] * len(samples)
        return {"image": image, key: self._target(target), "region": regions}

    def _target(self, target: Tensor) -> Tensor:
        """(B,H,W) masks, (B,) labels or (B,K) ones and zeros, in their type."""
        if self.task == "classification":
            return target.reshape(-1).long()
        if self.task == "multilabel":
            return target.float()
        if self.task == "super_resolution":
            return target.float() * self.scale  # (B,K,rH,rW)
        if target.ndim == 4:  # (B,1,H,W); for change the mask of the second date
            target = target[:, -1]
        return target.float() if self.task == "regression" else target.long()

    def _check_range(self, image: Tensor) -> None:
        if self.warned or float(image.max()) <= BRIGHTEST:
            return
        self.warned = True
        warnings.warn(
            f"images of {self.name} reach {float(image.max()):g} and are taken as they "
            "are, but a backbone expects reflectance from 0 to 1. Wrap the data: "
            "gk.TorchgeoData(data, task=..., scale=0.0001) for Sentinel-2, scale=1/255 "
            "for 8-bit pictures.",
            stacklevel=2,
        )

    def _order(self, split: str, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(len(self.dataset(split)))

    def _keep(self, kept: Mapping[str, np.ndarray], call: str) -> Self:
        smaller = copy.copy(self)
        parts = {
            name: Subset(self.sets[name], np.sort(chosen).tolist())
            for name, chosen in kept.items()
        }
        smaller.sets = self.sets | parts
        return smaller


def _split_sets(
    source: Source | L.LightningDataModule,
) -> dict[str, Dataset]:
    """The data set of each split."""
    if isinstance(source, L.LightningDataModule):
        return _module_sets(source)
    if not isinstance(source, Mapping):
        return {"train": _patches(source)}
    if "train" not in source or set(source) - set(SPLITS):
        raise ValueError(
            f"the mapping holds {', '.join(map(str, source)) or 'nothing'}; allowed "
            f"are {', '.join(SPLITS)}, and 'train' has to be there."
        )
    return {split: _patches(source[split]) for split in SPLITS if split in source}


def _patches(source: Dataset | DataLoader) -> Dataset:
    """A data set with a length; a GeoDataset has one by the sampler of a loader."""
    torchgeo = sys.modules.get("torchgeo.datasets")
    data = source.dataset if isinstance(source, DataLoader) else source
    if torchgeo is None or not isinstance(data, torchgeo.GeoDataset):
        return data
    if not isinstance(source, DataLoader):
        raise ValueError(
            f"{type(data).__name__} is a GeoDataset: a sampler has to pick patches of "
            "it. Pass torch.utils.data.DataLoader(data, sampler=RandomGeoSampler(data, "
            "size=64)), for each split its own: {'train': ..., 'test': ...}."
        )
    return GeoPatches(data, source.batch_sampler or source.sampler)


def _module_sets(module: L.LightningDataModule) -> dict[str, Dataset]:
    """The data sets of a data module, once it is prepared."""
    module.prepare_data()
    module.setup("fit")
    for stage in ("validate", "test"):
        with suppress(FileNotFoundError):  # not on the disk: no such split
            module.setup(stage)
    sets: dict[str, Dataset] = {}
    for split in SPLITS:
        data = getattr(module, f"{split}_dataset", None)
        if data is None:
            data = getattr(module, "dataset", None)
        samplers = (f"{split}_batch_sampler", f"{split}_sampler")
        sampler = next((s for n in samplers if (s := getattr(module, n, None))), None)
        if data is not None:
            sets[split] = GeoPatches(data, sampler) if sampler else _patches(data)
    if "train" not in sets:
        raise ValueError(
            f"{type(module).__name__} has no train_dataset after setup; pass its data "
            "sets as {'train': ..., 'val': ..., 'test': ...}."
        )
    return sets


class GeoPatches(Dataset):
    """The patches that a torchgeo sampler picks from a `GeoDataset`.

    The sampler, alone or in batches, is asked once: every epoch sees the same patches.
    """

    def __init__(self, data: GeoDataset, sampler: Iterable[Any]) -> None:
        self.data = data
        self.places: list[Any] = []
        for place in sampler:
            self.places += place if isinstance(place, list) else [place]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[self.places[index]]


Source = Dataset | DataLoader | Mapping[str, Dataset | DataLoader]
AnyData = SplitData | Source | L.LightningDataModule


def as_data(data: Any, task: str, num_classes: int) -> Any:
    """Data as `fit` and `evaluate` take it; what torchgeo has is wrapped."""
    if isinstance(data, SplitData):
        return data
    if isinstance(data, Dataset | Mapping | L.LightningDataModule | DataLoader):
        size = getattr(data, "batch_size", None) or 8
        return TorchgeoData(data, task, num_classes, batch_size=size)
    return data
