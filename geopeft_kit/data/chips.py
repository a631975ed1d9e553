"""`ChipData`: a chip folder as a Lightning data module, split by region.

    data = gk.ChipData("data/floods", bands="hls", test_regions=["savanna"])

Batches are torchgeo-style dicts; `image` is reflectance from 0 to 1 and is normalised
nowhere but inside the backbone. Taught in `notebooks/00_quickstart.ipynb` and
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn

from geopeft_kit.bands import band_indices, resolve_bands
from geopeft_kit.data.augmentation import Augmentation
from geopeft_kit.data.folder import InPlace, read_chip_folder
from geopeft_kit.data.loading import ChipDataset, ChipTable
from geopeft_kit.data.own.from_pairs import from_pairs
from geopeft_kit.data.packing import pack, pack_key
from geopeft_kit.data.reading import ChipReader
from geopeft_kit.data.split_data import SplitData
from geopeft_kit.data.splits import resolve_split, sorted_splits
from geopeft_kit.data.subsets import n_shot, nested_order
from geopeft_kit.download import cache_folder

CACHE_LIMIT = 512 * 1024**2  # bytes of stored pixels that are kept in memory unasked


class ChipData(SplitData):
    """A chip folder, split and ready to batch.

    Args:
        folder: As `write_chip_folder` made it.
        bands: Bands to read, in this order: a sensor ("hls"), names or numbers; None
            reads all of the folder.
        split: "region" (hold `test_regions` out, or the folder's own lists where none
            are given), "longitude", "country" or "cluster" (hold out the groups that
            `test_regions` names, or drawn ones), "index" (the folder's own lists as
            they are) or "random".
        test_regions: Regions, or groups of the split's kind, to hold out.
        batch_size: Chips in a batch. A last training batch of a single chip is left
            out, since batch norm cannot compute on it; shuffling changes which.
        val_fraction: Share of the training chips that validates, drawn scene by scene.
        num_workers: Processes that read; 0 reads in this one.
        seed: Of splits and of the order in training.
        augment: True flips and turns training chips, image and mask alike. A list of
            kornia's transforms (`kornia.augmentation`, or torchgeo's) does what they
            do: geometry to image and mask, colour to the bands below.
        colour_bands: Bands that brightness and contrast may change; None takes red,
            green and blue. Hue and saturation always meet these three alone.
        cache: Keep chips in memory once read. None does so up to 512 MB of stored
            pixels when `num_workers` is 0 (a worker's memory is its own).
        buffer_m: Least distance in metres from test chips to all others; nearer
            chips are set aside, and a warning counts them. Touching ones always are
            where groups are held out; regions that share ground are refused.
        blocks: Number of longitude blocks or clusters.

    Attributes:
        name, task, classes, colours, ignore_index, simulated, info: The folder's facts.
        bands: Names of the channels of `image`, in order.
        num_classes: Channels that a model has to put out.
        regions: All region names, sorted.
        splits: The splits that have chips.
        index: GeoDataFrame; its column `split` says what was resolved.
        hparams: The arguments above, by name.
        subsets: The calls of `subset` and `n_shot` that led here, as code.
        factor: Of `for_super_resolution`; else 1.

    Raises:
        FileNotFoundError: No chip folder, or files of it are missing.
        ValueError: Unknown bands, split or regions, or an index that was altered.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | InPlace,
        bands: str | Sequence[str] | None = None,
        split: str = "region",
        test_regions: Sequence[str] | None = None,
        batch_size: int = 8,
        val_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool | Sequence[nn.Module] = False,
        cache: bool | None = None,
        buffer_m: float = 0.0,
        colour_bands: str | Sequence[str] | None = None,
        blocks: int = 5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the arguments, as `hparams`
        self.subsets: tuple[str, ...] = ()
        self.factor = 1
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        if isinstance(folder, InPlace):
            self.folder, self.info, self.index = folder
        else:
            self.folder = Path(folder)
            self.info, self.index = read_chip_folder(self.folder)
        self.test_regions = list(test_regions or ())
        available = self.info.bands
        self.bands = available if bands is None else resolve_bands(bands)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.augment = seed, bool(augment)
        if not isinstance(augment, bool):
            self.transforms = Augmentation(augment, self.bands, colour_bands)
        self._read_facts()
        reader = ChipReader(self.folder, self.info, band_indices(self.bands, available))
        if cache is None:
            cache = num_workers == 0 and self._stored_bytes() <= CACHE_LIMIT
        self._table = ChipTable(self.index, reader, cache)
        self._resolve(split, test_regions, val_fraction, seed, buffer_m, blocks)

    from_pairs = classmethod(from_pairs)  # type: ignore[var-annotated]

    def _read_facts(self) -> None:
        info = self.info
        self.name, self.task, self.simulated = info.name, info.task, info.simulated
        self.classes = list(info.classes) or None
        self.colours = list(info.colours) or None
        self.num_classes, self.ignore_index = info.num_classes, info.ignore_index
        self.regions = sorted(self.index["region"].astype(str).unique())

    def _resolve(
        self, split: str, test_regions: Sequence[str] | None, *settings: Any
    ) -> None:
        """Fill the column `split`; chips without a target take no part in it."""
        labelled = self.index[self.info.target].notna()
        resolved = self.index["split"].astype(object).where(labelled, "unlabelled")
        if labelled.any():
            resolved[labelled] = resolve_split(
                self.index[labelled], split, test_regions, *settings
            )
        self.index["split"] = resolved

    def _stored_bytes(self) -> int:
        """An upper guess of what all chips take: 4 bytes a value, 8 a mask pixel."""
        pixels = int((self.index["width"] * self.index["height"]).sum())
        dates = 2 if self.task == "change" else 1
        mask = 8 if self.info.target == "mask" else 0
        return pixels * (4 * len(self.bands) * dates + mask)

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have chips: train, val, test, then others."""
        return sorted_splits(set(self.index["split"]) - {"unused"})

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first chip, training chips first."""
        rows = self.index[self.index["split"] == self.splits[0]]
        height, width = int(rows["height"].iloc[0]), int(rows["width"].iloc[0])
        return height // self.factor, width // self.factor

    @property
    def one_size(self) -> bool:
        """Whether all training images have one size, so that their maps can be kept."""
        rows = self.index[self.index["split"] == self.splits[0]]
        return len(rows[["height", "width"]].drop_duplicates()) < 2

    def dataset(self, split: str) -> ChipDataset:
        """The samples of one split.

        Args:
            split: "train", "val", "test" or another of `splits`.

        Returns:
            A data set of dicts without a batch axis.

        Raises:
            ValueError: The split has no chips.
        """
        rows = np.flatnonzero((self.index["split"] == split).to_numpy())
        if not len(rows):
            counts = self.index["split"].value_counts()
            there = ", ".join(f"{name} ({counts[name]})" for name in self.splits)
            raise ValueError(
                f"split {split!r} of {self.name} has no chips; it has {there}. Choose "
                "one of these, or other test_regions or val_fraction."
            )
        return ChipDataset(self._table, rows, self.transforms, self.factor)

    def _check_sizes(self, split: str) -> None:
        rows = self.index[self.index["split"] == split]
        sizes = rows[["height", "width"]].drop_duplicates()
        if len(sizes) > 1 and self.batch_size > 1:
            some = [f"{h} x {w}" for h, w in sizes.to_numpy()[:3]]
            raise ValueError(
                f"chips of {split!r} have {len(sizes)} sizes ({', '.join(some)}), "
                "which cannot share a batch. Cut them to one size, or use batch_size=1."
            )

    def cache(self, folder: str | os.PathLike[str] | None = None) -> Path:
        """Pack all chips into one memory-mapped file, and read from it from now on.

        The pack is named after the content of the files, so other files make another
        pack. It is written whole or not at all, and used again where it exists. Files
        that change while this object lives are not looked at again.

        Args:
            folder: Where packs are kept; None takes the kit's cache folder. A pack is
                as large as the chips are without compression.

        Returns:
            The folder of the pack; delete it to free the space.

        Raises:
            ValueError: Chips differ in size or type.
            RuntimeError: A chip cannot be read.
            OSError: The pack cannot be written.
        """
        table = self._table
        names = [name for part in table.files.values() for name in part if name]
        info = self.info
        facts = f"{info.task} {info.nodata} {info.ignore_index} {len(info.classes)}"
        root = cache_folder() / "packed" if folder is None else Path(folder)
        target = root / pack_key(self.folder, names, self.bands, facts)
        rows = range(len(self.index))
        chips = (table.reader.read(*table.files_of(row)) for row in rows)
        table.packed = pack(target, chips, len(self.index), info)
        table.stored.clear()
        return target

    def _order(self, split: str, seed: int) -> np.ndarray:
        return nested_order(self.index.iloc[self.dataset(split).rows], seed)

    def n_shot(self, n: int, seed: int = 0, by: str = "region") -> ChipData:
        """The same data with `n` training chips of each bucket: few labels.

        So 50-shot data with six regions has 300 training chips, as PhilEO Bench counts.
        Nested: with one seed the chips of `n_shot(5)` are among those of `n_shot(10)`.
        Of the validation chips a fifth of `n`, rounded up, stays in each bucket, or
        what there is. The test split stays whole.

        Args:
            n: Training chips of each bucket.
            seed: Of the choice.
            by: What the buckets are: "region", "label" (classification), or another
                column of `index`.

        Returns:
            A new `ChipData` that shares what was already read.

        Raises:
            ValueError: A bucket has fewer than `n` training chips, or `by` is no
                bucket of every chip.
        """
        train = self.index.iloc[self.dataset("train").rows]
        kept = {"train": n_shot(train, max(n, 0), seed, by)}
        sizes = train[by].value_counts()
        if not 1 <= n <= sizes.min():
            raise ValueError(
                f"{n} chips of each {by} asked for, but {by} {sizes.idxmin()!r} has "
                f"{sizes.min()} for training; choose n from 1 to {sizes.min()}."
            )
        if "val" in self.splits:
            val = self.index.iloc[self.dataset("val").rows]
            kept["val"] = n_shot(val, math.ceil(0.2 * n), seed, by)
        return self._keep(kept, f'.n_shot({n}, {seed}, "{by}")')

    def _keep(self, kept: Mapping[str, np.ndarray], call: str) -> Self:
        smaller = copy.copy(self)
        smaller.index = self.index.copy()
        split = smaller.index["split"].to_numpy(dtype=object, copy=True)
        for name, chosen in kept.items():
            split[np.delete(self.dataset(name).rows, chosen)] = "unused"
        smaller.index["split"] = split
        smaller.subsets = (*self.subsets, call)
        return smaller

    def for_super_resolution(self, factor: int = 2) -> ChipData:
        """The same chips as coarse images whose finer selves are to be found.

        An image is the mean over factor x factor pixels of a chip, the chip itself the
        target; its labels play no part. A sensor with larger pixels blurs more than
        that mean does, so this is easier than pairs of two sensors.

        Args:
            factor: Fine pixels along one coarse one, 2 or more.

        Returns:
            A new `ChipData` of task "super_resolution".

        Raises:
            ValueError: A factor that does not divide the chips, or chips of two dates.
        """
        sides = set(self.index["height"]) | set(self.index["width"])
        whole = isinstance(factor, int) and factor >= 2
        if not whole or any(side % factor for side in sides):
            raise ValueError(
                f"factor is {factor}; it must be a whole number from 2 on and divide "
                f"the sides of all chips: {', '.join(map(str, sorted(sides)[:5]))} px."
            )
        if self.task == "change":
            raise ValueError(
                "chips of two dates cannot be made coarser; take one date."
            )
        finer = copy.copy(self)
        finer.task, finer.factor = "super_resolution", factor
        finer.num_classes, finer.classes, finer.colours = len(self.bands), None, None
        return finer

    def __repr__(self) -> str:
        counts = self.index["split"].value_counts()
        parts = ", ".join(f"{counts[name]} {name}" for name in self.splits)
        return (
            f"ChipData({self.name!r}: {self.task}, {len(self.bands)} bands, {parts}; "
            f"{len(self.regions)} regions)"
        )
