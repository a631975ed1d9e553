"""`SplitData`: samples in splits and their batches, as `fit` and `evaluate` take them.

`ChipData` (a chip folder) and `TorchgeoData` (whatever torchgeo has) derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from geopeft_kit.data.augmentation import Augmentation
from geopeft_kit.data.loading import ChipDataset, EpochSampler


class SplitData(L.LightningDataModule):
    """Data in splits, batched alike.

    A subclass sets the attributes, and says which `splits` there are, what `dataset` a
    split has, in which `_order` it is cut down and how to `_keep` a part of it.

    Attributes:
        task, num_classes, ignore_index: What a model has to put out.
        augment, transforms: Whether training chips are turned, and by what.
    """

    task: str
    num_classes: int
    ignore_index: int
    batch_size: int
    num_workers: int
    seed: int
    simulated = False
    augment = False
    transforms: Augmentation | None = None
    collate: Any = None  # of samples to a batch; None is torch's own

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have samples: train, val, test, then others."""
        raise NotImplementedError

    @property
    def one_size(self) -> bool:
        """Whether all training images have one size, so that their maps can be kept."""
        return True

    def dataset(self, split: str) -> Any:
        """The samples of one split, dicts without a batch axis.

        Args:
            split: One of `splits`.

        Raises:
            ValueError: There is no such split.
        """
        raise NotImplementedError

    def dataloader(
        self,
        split: str,
        shuffle: bool = False,
        seed: int | None = None,
        augment: bool | None = None,
    ) -> DataLoader:
        """Batches of one split.

        Args:
            split: "train", "val", "test" or another of `splits`.
            shuffle: In an order that depends on the seed and the epoch alone.
            seed: None takes the data's own.
            augment: As the data says, else flips and turns. None does so for shuffled
                training chips where the data was built with `augment`. A torchgeo data
                set has transforms of its own instead.

        Returns:
            A loader of dicts: image (B,C,H,W), or (B,C,2,H,W) for change, mask
            (B,H,W) or label (B,) ...

        Raises:
            ValueError: There is no such split, its samples cannot share a batch, or
                augmentation is asked for without shuffling.
        """
        dataset = self.dataset(split)
        self._check_sizes(split)
        if augment is None:
            augment = self.augment and shuffle and split == "train"
        if augment and not shuffle:
            raise ValueError(
                "augment=True draws from the epoch, which only a shuffled loader "
                "knows; pass shuffle=True as well."
            )
        sampler = None
        if shuffle:
            order = self.seed if seed is None else seed
            turns = augment and isinstance(dataset, ChipDataset)
            sampler = EpochSampler(len(dataset), order, turns, self.batch_size)
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own: making an iterator draws a number, and it would
            # draw it from the state that dropout uses.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _check_sizes(self, split: str) -> None:
        """Refuse samples that cannot share a batch, where that is known before."""

    def train_dataloader(self) -> DataLoader:
        """Training batches in an order that depends on the seed and the epoch."""
        return self.dataloader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Validation batches; an empty list where there is no such split."""
        return self.dataloader("val") if "val" in self.splits else []

    def test_dataloader(self) -> DataLoader:
        """Test batches: the unseen regions."""
        return self.dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Test batches, for Lightning's `predict`."""
        return self.dataloader("test")

    def subset(self, n: int, seed: int = 0, split: str = "train") -> Self:
        """The same data with only `n` samples in one split.

        Subsets are nested: with one seed, the 10 chips of `subset(10)` are among the
        32 of `subset(32)`. Classes (for labels) or regions (for masks) of a chip folder
        take part in proportion.

        Args:
            n: Samples to keep.
            seed: Of the choice.
            split: Which split is cut down; the others stay.

        Returns:
            New data that shares what was already read.

        Raises:
            ValueError: `n` is below 1 or above what the split has.
        """
        size = len(self.dataset(split))
        if not 1 <= n <= size:
            raise ValueError(
                f"subset of {n} samples asked for, but split {split!r} has {size}; "
                f"choose n from 1 to {size}."
            )
        kept = self._order(split, seed)[:n]
        return self._keep({split: kept}, f'.subset({n}, {seed}, "{split}")')

    def _order(self, split: str, seed: int) -> np.ndarray:
        """Positions in a split; every beginning is a subset."""
        raise NotImplementedError

    def _keep(self, kept: Mapping[str, np.ndarray], call: str) -> Self:
        """A copy in which only these positions of some splits are left."""
        raise NotImplementedError

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(self.dataset(name))} {name}" for name in self.splits)
        return f"{type(self).__name__}({self.name!r}: {self.task}, {parts})"

    # Lightning's own text would build every loader to count its batches.
    def __str__(self) -> str:
        return repr(self)
