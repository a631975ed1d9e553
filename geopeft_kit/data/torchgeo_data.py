"""torchgeo's data sets and data modules, as `fit` and `evaluate` take them.

    gk.fit(model, EuroSAT100(root, transforms=scaled))      # as it is
    gk.fit(model, gk.TorchgeoData(OSCDDataModule(...), task="change", scale=1e-4))

`gk.fit` wraps whatever is no `ChipData` itself. Values are taken as they are unless a
scale is given: images are meant to be reflectance from 0 to 1. torchgeo's own
normalisation and augmentation run inside its trainer and are not used here, since a
backbone normalises by its card.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.info import CLASS_TASKS, TASKS
from geopeft_kit.data.loading import EpochSampler

if TYPE_CHECKING:
    from torchgeo.datasets import GeoDataset

SPLITS = ("train", "val", "test")
BRIGHTEST = 20.0  # reflectance never comes near; stored numbers are above


class TorchgeoData:
    """A torchgeo data set or data module with the face of a `ChipData`.

    Args:
        source: A data set (it trains), a mapping from split to data set, or a data
            module, which is prepared here.
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

    augment = False
    transforms = None
    simulated = False

    def __init__(
        self,
        source: Dataset | Mapping[str, Dataset] | L.LightningDataModule,
        task: str,
        num_classes: int | None = None,
        scale: float = 1.0,
        ignore_index: int = 255,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
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
        """Names of the splits that are there."""
        return list(self.sets)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first training sample."""
        first: Any = self.sets["train"]
        height, width = first[0]["image"].shape[-2:]
        return int(height), int(width)

    def dataset(self, split: str) -> Dataset:
        """Torchgeo's own data set of a split.

        Args:
            split: One of `splits`.

        Returns:
            The data set.

        Raises:
            ValueError: There is no such split.
        """
        if split not in self.sets:
            raise ValueError(
                f"{self.name} has no split {split!r}; it has {', '.join(self.sets)}. "
                "Pass a data module, or {'train': ..., 'val': ..., 'test': ...}."
            )
        return self.sets[split]

    def dataloader(
        self,
        split: str,
        shuffle: bool = False,
        seed: int | None = None,
        augment: bool | None = None,
    ) -> DataLoader:
        """Batches of one split, as `ChipData.dataloader` gives them.

        Args:
            split: One of `splits`.
            shuffle: In an order that depends on the seed and the epoch alone.
            seed: None takes the data's own.
            augment: Not used; give the data set transforms.

        Returns:
            A loader of dicts: image (B,C,H,W), or (B,C,2,H,W) for change, mask
            (B,H,W) or label, region.
        """
        data: Any = self.dataset(split)
        sampler = None
        if shuffle:
            order = self.seed if seed is None else seed
            sampler = EpochSampler(len(data), order, drop_last_of=self.batch_size)
        return DataLoader(
            data,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Turn torchgeo's samples into a batch of ours.

        Args:
            samples: Dicts with `image` and `mask` or `label`.

        Returns:
            The batch.

        Raises:
            ValueError: A key is missing, or images differ in shape.
        """
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

    def subset(self, n: int, seed: int = 0, split: str = "train") -> TorchgeoData:
        """The same data with only `n` samples in one split, nested for one seed.

        Args:
            n: Samples to keep.
            seed: Of the choice.
            split: Which split is cut down.

        Returns:
            A new `TorchgeoData`.
        """
        data: Any = self.dataset(split)
        order = np.random.default_rng(seed).permutation(len(data))[:n]
        smaller = copy.copy(self)
        smaller.sets = self.sets | {split: Subset(data, sorted(order.tolist()))}
        return smaller


def _split_sets(
    source: Dataset | Mapping[str, Dataset] | L.LightningDataModule,
) -> dict[str, Dataset]:
    """The data set of each split."""
    if isinstance(source, L.LightningDataModule):
        return _module_sets(source)
    if not isinstance(source, Mapping):
        return {"train": source}
    if "train" not in source or set(source) - set(SPLITS):
        raise ValueError(
            f"the mapping holds {', '.join(map(str, source)) or 'nothing'}; allowed "
            f"are {', '.join(SPLITS)}, and 'train' has to be there."
        )
    return {split: source[split] for split in SPLITS if split in source}


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
            sets[split] = data if sampler is None else GeoPatches(data, sampler)
    if "train" not in sets:
        raise ValueError(
            f"{type(module).__name__} has no train_dataset after setup; pass its data "
            "sets as {'train': ..., 'val': ..., 'test': ...}."
        )
    return sets


class GeoPatches(Dataset):
    """The patches that a torchgeo sampler picks from a `GeoDataset`, drawn once.

    Args:
        data: Answers to a place and a time.
        sampler: Any of torchgeo's, alone or in batches. A random one is asked once, so
            that every epoch sees the same patches.
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


AnyData = (
    ChipData | TorchgeoData | Dataset | Mapping[str, Dataset] | L.LightningDataModule
)


def as_data(data: Any, task: str, num_classes: int) -> Any:
    """What `fit` and `evaluate` work with: anything but a `ChipData` is wrapped.

    Args:
        data: A `ChipData`, a `TorchgeoData`, or what the latter takes.
        task: Of the model.
        num_classes: Of the model.

    Returns:
        The data.
    """
    if isinstance(data, ChipData | TorchgeoData):
        return data
    if isinstance(data, Dataset | Mapping | L.LightningDataModule):
        size = getattr(data, "batch_size", None) or 8
        return TorchgeoData(data, task, num_classes, batch_size=size)
    return data
