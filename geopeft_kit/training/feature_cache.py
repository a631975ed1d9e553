"""Feature cache: a frozen network sees each image only once.

With nothing trainable in the backbone, every epoch would compute the same feature maps
again. `FeatureCache` computes them once and serves them as a data set, so that later
epochs cost the decoder alone. Flips and quarter turns are a finite set: with them there
are eight variants of each image, and each is computed once. Taught in notebooks 02
and 08.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from geopeft_kit.array_store import ArrayStore
from geopeft_kit.data.batch import Batch
from geopeft_kit.data.loading import (
    AugmentedKey,
    ChipDataset,
    drawn_symmetry,
    symmetry,
)
from geopeft_kit.download import cache_folder
from geopeft_kit.files import content_key
from geopeft_kit.model import Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.prefix_cache import Prefix

LIMIT_MIB = 4096.0
MIB = 2**20
SYMMETRIES = 8
VERSION = 2  # of the stores on disk


class FeatureCache(Dataset):
    """Feature maps of a data set, with the targets.

    Args:
        model: The model whose `features` are kept; put into eval mode meanwhile, so
            that dropout and batch statistics play no part.
        loader: Batches in a fixed order, without augmentation.
        device: Where to compute; the maps are kept in main memory.
        limit_mib: More than that goes to files under GEOPEFT_CACHE, which are
            memory-mapped and found again by a later run with the same weights, bands,
            preprocessing and pixels.
        augment: Keep all eight symmetries of each image, for a sampler that augments.
        prefix: Keep what these frozen blocks put out, and not the features.
        progress: Show a bar where it takes more than a second.

    Raises:
        OSError: The maps go to disk, and it has no room.
    """

    def __init__(
        self,
        model: Model,
        loader: DataLoader,
        device: torch.device | str = "cpu",
        limit_mib: float = LIMIT_MIB,
        augment: bool = False,
        prefix: Prefix | None = None,
        progress: bool = False,
    ) -> None:
        chips: Any = loader.dataset
        variants = SYMMETRIES if augment else 1
        kept = prefix.kept if prefix else "features"
        self.title = "prefix" if prefix else "features"
        self.samples: list[dict[str, Any]] = []

        def compute(batch: Batch) -> Sequence[Tensor]:
            batch = batch.to(device)
            if prefix is not None:
                return prefix.record(batch)
            return model.features(batch.image, batch.meta)

        training = model.training
        model.eval()
        try:
            # no_grad rather than inference_mode, whose tensors could not train
            with torch.no_grad():
                images = self._read(loader, 0, progress)
                first = compute(next(images))
                rows = len(chips) * variants
                row = sum(m[0].numel() * m.element_size() for m in first)
                folder = None
                if row * rows > limit_mib * MIB:
                    key = _store_key(model, chips, [variants, kept])
                    folder = cache_folder() / "features" / key
                turned = (self._read(loader, n, progress) for n in range(1, variants))
                rest = map(compute, chain(images, chain.from_iterable(turned)))
                self.store = MapStore(chain([first], rest), rows, row * rows, folder)
                for _ in images:  # the targets, where an earlier run wrote the maps
                    pass
        finally:
            model.train(training)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | AugmentedKey) -> dict[str, Any]:
        """One sample; an `AugmentedKey` draws its symmetry as `ChipDataset` does."""
        position = key.position if isinstance(key, AugmentedKey) else key
        number = drawn_symmetry(key) if isinstance(key, AugmentedKey) else 0
        sample = dict(self.samples[position])
        if number and "mask" in sample:
            sample["mask"] = symmetry([sample["mask"]], number)[0]
        row = number * len(self.samples) + position
        return sample | {"features": self.store.row(row)}

    @property
    def maps(self) -> list[Tensor]:
        """Each level's maps of the whole data set as it is, (N, C_i, h, w)."""
        return [level[: len(self.samples)] for level in self.store.whole()]

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of cached maps, with the image size that outputs are made for."""
        return default_collate(samples) | {"size": self.size}

    def _read(self, loader: DataLoader, number: int, progress: bool) -> Iterator[Batch]:
        """The batches in one of the symmetries; the first pass keeps the targets."""
        bar = progress_bar(loader, progress, desc=self.title, leave=False, delay=1)
        for loaded in bar:
            batch = Batch.of(loaded)
            if number:
                image = symmetry([loaded["image"]], number)[0]
                yield batch._replace(image=image)
                continue
            self.size = batch.size
            target = "mask" if "mask" in loaded else "label"
            for value, region in zip(loaded[target], batch.region, strict=True):
                # clone(), or each sample would keep its whole batch alive
                self.samples.append({target: value.clone(), "region": region})
            yield batch


class MapStore:
    """Rows of several maps: in memory, or in a folder that may be there already.

    `maps` yields batches of rows, each (B, ...); OSError if the disk has no room.
    """

    def __init__(
        self,
        maps: Iterator[Sequence[Tensor]],
        rows: int,
        size: int,
        folder: Path | None = None,
    ) -> None:
        self.files: ArrayStore | None = None
        maps = _of_one_size(maps)
        if folder is None:
            self.levels = _in_memory(maps, rows)
            return
        arrays = (
            {str(i): m.numpy(force=True) for i, m in enumerate(part)} for part in maps
        )
        try:
            _check_room(folder, size)
            self.files = ArrayStore.write(folder, arrays, rows)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}; the maps of this data set need "
                f"{size / MIB:,.0f} MiB on disk. Point GEOPEFT_CACHE at a larger disk, "
                "pass cache_features=False to fit, or take a smaller data set. The "
                "maps were to go to",
                str(folder),
            ) from error
        self.levels = [torch.from_numpy(a) for a in self.files.arrays.values()]

    def row(self, index: int) -> list[Tensor]:
        """The maps of one row."""
        if self.files is not None:
            self.files.row(index)  # checks its content
        return [level[index] for level in self.levels]

    def whole(self) -> list[Tensor]:
        """The maps of all rows."""
        if self.files is not None:
            self.files.whole()
        return self.levels


def _of_one_size(maps: Iterator[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    """The same batches; an error if their maps differ in size."""
    first: list[torch.Size] = []
    for part in maps:
        sizes = [level.shape[1:] for level in part]
        first = first or sizes
        if sizes != first:
            raise ValueError(
                "images of several sizes have features of several sizes, which cannot "
                "be kept. Pass head_start='calibrate' and cache_features=False, or cut "
                "the images to one size."
            )
        yield part


def _in_memory(maps: Iterator[Sequence[Tensor]], rows: int) -> list[Tensor]:
    levels: list[Tensor] = []
    filled = 0
    for part in maps:
        if not levels:
            levels = [torch.empty((rows, *m.shape[1:]), dtype=m.dtype) for m in part]
        for level, new in zip(levels, part, strict=True):
            level[filled : filled + len(new)] = new.to("cpu")
        filled += len(part[0])
    return levels


def _store_key(model: Model, dataset: ChipDataset, kept: Any) -> str:
    """Key of all that maps depend on: weights, preprocessing, bands, pixels."""
    backbone, table = model.backbone, dataset.table
    files = [
        Path(table.reader.folder) / name
        for row in dataset.rows
        for name in (table.files["image"][row], table.files["image_after"][row])
        if name
    ]
    outside = [
        t for n, t in backbone.state_dict().items() if not n.startswith("model.")
    ]
    facts = [
        VERSION,
        backbone.weights_hash(),
        _hash([*outside, backbone.mean, backbone.std]),
        [backbone.normalise, backbone.card.normalisation.scale, backbone.bands],
        [model.task, model.fusion, model.factor, list(model.decoder.reads)],
        [t[dataset.rows].tobytes().hex() for t in (table.date, table.lonlat)],
        kept,
    ]
    return content_key(facts, files)[:32]


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    """Fail before anything is computed where the disk is too small."""
    place = next(path for path in folder.parents if path.exists())
    if not folder.exists() and needed > shutil.disk_usage(place).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
