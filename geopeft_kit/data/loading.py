"""Samples and their order: a `Dataset` of chips, seeded shuffling, flips and turns.

Order and augmentation of epoch e depend on (seed, e) alone and not on what ran before,
so a run that was killed and resumed sees the same images. Lightning tells the epoch to
any sampler that has `set_epoch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset, Sampler

from geopeft_kit.array_store import DamagedStoreError
from geopeft_kit.data.augmentation import Augmentation
from geopeft_kit.data.index import dates_of, labels_of, lonlat_of
from geopeft_kit.data.packing import PackedChips
from geopeft_kit.data.reading import ChipReader, Files, StoredChip

if TYPE_CHECKING:
    import geopandas as gpd


class AugmentedKey(NamedTuple):
    """Which sample, and what its flips and turns are drawn from."""

    position: int
    seed: int
    epoch: int


class EpochSampler(Sampler):
    """Positions of `size` samples in an order of the seed and the epoch alone.

    Args:
        size: Number of samples.
        seed: Of the order.
        augment: Yield keys that ask a `ChipDataset` for flips and turns as well;
            False yields plain positions, which any data set takes.
        drop_last_of: With this batch size, leave out a last batch of a single sample,
            on which batch norm cannot compute; 0 keeps all.
    """

    def __init__(
        self, size: int, seed: int = 0, augment: bool = False, drop_last_of: int = 0
    ) -> None:
        self.size, self.seed, self.augment = size, seed, augment
        self.epoch = 0
        lone = drop_last_of > 1 and size > 1 and size % drop_last_of == 1
        self.length = size - 1 if lone else size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int | AugmentedKey]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for index in order[: self.length].tolist():
            yield AugmentedKey(index, self.seed, self.epoch) if self.augment else index


def flip_and_turn(tensors: Sequence[Tensor], key: AugmentedKey) -> list[Tensor]:
    """One of the eight symmetries of a square, drawn from the key, on (..., H, W).

    Tensors that are not square are turned by 180 degrees, so that their shape stays.
    """
    return symmetry(tensors, drawn_symmetry(key))


def drawn_symmetry(key: AugmentedKey) -> int:
    """The number, 0 to 7, of the symmetry that belongs to a key."""
    turns, flip = np.random.default_rng(list(key)).integers((4, 2))
    return int(2 * turns + flip)


def symmetry(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    """Symmetry 0 to 7: quarter turns are its half, an odd one mirrors besides."""
    turns, flip = divmod(number, 2)
    if tensors[0].shape[-2] != tensors[0].shape[-1]:
        turns = 2 * (turns % 2)
    turned = [torch.rot90(tensor, turns, (-2, -1)) for tensor in tensors]
    if flip:
        turned = [tensor.flip(-1) for tensor in turned]
    return [tensor.contiguous() for tensor in turned]


@dataclass
class ChipTable:
    """The index as plain lists: pandas takes longer to look up a row than to read it.

    `stored` holds the chips that are kept, for all data sets on this table; `packed`
    is read instead of the files.
    """

    index: gpd.GeoDataFrame
    reader: ChipReader
    cache: bool  # keep each chip in memory once it was read
    stored: dict[int, StoredChip] = field(default_factory=dict)
    packed: PackedChips | None = None

    def __post_init__(self) -> None:
        info, index = self.reader.info, self.index
        self.chips = index["chip"].astype(str).tolist()
        self.regions = index["region"].astype(str).tolist()
        sizes = index["height"].tolist(), index["width"].tolist()
        self.sizes = list(zip(*sizes, strict=True))
        self.files = {
            name: [f if isinstance(f, str) else None for f in index[name]]
            if name in index
            else [None] * len(index)
            for name in ("image", "image_after", "mask")
        }
        if info.task != "change":
            self.files["image_after"] = [None] * len(index)
        if info.target != "mask":
            self.files["mask"] = [None] * len(index)
        self.labels = labels_of(index, info.task, info.num_classes)
        self.date = dates_of(index, info.task == "change")
        self.lonlat = lonlat_of(index)

    def read(self, rows: Sequence[int]) -> list[StoredChip]:
        """Chips of some rows, from memory where they are kept."""
        if self.packed is not None:
            return [self._read_packed(self.packed, row) for row in rows]
        found = {row: self.stored[row] for row in rows if row in self.stored}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        chips = self.reader.read_many(self.files_of(row) for row in missing)
        found |= zip(missing, chips, strict=True)
        if self.cache:
            self.stored |= found
        return [found[row] for row in rows]

    def _read_packed(self, packed: PackedChips, row: int) -> StoredChip:
        """A chip of the pack; where that is damaged, from the chip's own files."""
        try:
            return packed.read(row)
        except DamagedStoreError as error:
            warnings.warn(f"{error} Until then files are read.", stacklevel=2)
            return self.reader.read(*self.files_of(row))

    def files_of(self, row: int) -> Files:
        """The arguments of `ChipReader.read` for a row."""
        image, after, mask = (self.files[name][row] for name in self.files)
        return self.chips[row], str(image), after, mask, self.sizes[row]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is spawned starts with an empty memory.
        return {**self.__dict__, "stored": {}}


class ChipDataset(Dataset):
    """Samples of some rows of a table, as torchgeo-style dicts.

    `augmentation` is what an `AugmentedKey` asks for, None flips and turns. With a
    `factor` above 1 the chip is the target, and its means over factor x factor pixels
    are the image.
    """

    def __init__(
        self,
        table: ChipTable,
        rows: np.ndarray,
        augmentation: Augmentation | None = None,
        factor: int = 1,
    ) -> None:
        self.table, self.augmentation, self.factor = table, augmentation, factor
        self.rows = rows.tolist()
        # A key is in every sample or in none, so that batches can be stacked.
        self.has_date = not np.isnan(table.date[rows]).any()
        self.has_lonlat = not np.isnan(table.lonlat[rows]).any()
        self.has_mask = all(table.files["mask"][row] for row in self.rows)
        self.has_label = all(table.labels[row] is not None for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | AugmentedKey) -> dict[str, Any]:
        """One sample; an `AugmentedKey` flips and turns it.

        image (C,H,W) float32 reflectance, or (C,2,H,W) for change; mask (H,W) int64 or
        float32, or label () int64 or (K,) float32; chip, region, crs; bounds (4,) in
        that CRS; transform (6,) of the image unless it is turned; date (T,2) and
        lonlat (2,) where known.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | AugmentedKey]) -> list[dict[str, Any]]:
        """Several samples at once; `DataLoader` asks for a whole batch this way."""
        rows = [
            self.rows[k.position if isinstance(k, AugmentedKey) else k] for k in keys
        ]
        stored = self.table.read(rows)
        return [self._sample(*each) for each in zip(keys, rows, stored, strict=True)]

    def _sample(
        self, key: int | AugmentedKey, row: int, stored: StoredChip
    ) -> dict[str, Any]:
        table = self.table
        image = table.reader.reflectance(stored)
        mask = torch.from_numpy(stored.mask) if self.has_mask else None
        if isinstance(key, AugmentedKey) and self.augmentation is not None:
            info = table.reader.info
            ignore = np.nan if info.task == "regression" else info.ignore_index
            image, mask = self.augmentation(image, mask, key, ignore)
        elif isinstance(key, AugmentedKey):
            both = [image] if mask is None else [image, mask]
            image, *rest = flip_and_turn(both, key)
            mask = rest[0] if rest else None
        if self.factor > 1:
            mask, image = image, avg_pool2d(image, self.factor)
        sample: dict[str, Any] = {"image": image}
        if mask is not None:
            sample["mask"] = mask
        if self.has_label and self.factor == 1:
            sample["label"] = table.labels[row]
        sample |= {
            "chip": table.chips[row],
            "region": table.regions[row],
            "crs": stored.grid.crs,
            "bounds": torch.tensor(stored.grid.bounds, dtype=torch.float64),
        }
        if not isinstance(key, AugmentedKey):
            grid = stored.grid.transform or (np.nan,) * 6
            sample["transform"] = torch.tensor(grid, dtype=torch.float64)
            sample["transform"][[0, 1, 3, 4]] *= self.factor
        if self.has_date:
            sample["date"] = torch.from_numpy(table.date[row])
        if self.has_lonlat:
            sample["lonlat"] = torch.from_numpy(table.lonlat[row])
        return sample
