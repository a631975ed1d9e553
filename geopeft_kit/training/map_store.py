"""A store of maps: in memory up to a limit, else memory-mapped on disk and kept there.

What a frozen network computes depends on its weights, its preprocessing and the pixels.
The name of a store on disk is the hash of all three, so that another run of the same
set-up finds it, and no other run can.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from geopeft_kit.data.loading import ChipDataset
from geopeft_kit.download import cache_folder
from geopeft_kit.model import Model

MIB = 2**20


class MapStore:
    """Rows of several maps, filled once and then read in any order.

    More than `limit_mib` goes to disk, under the name that `key` gives. `complete` is
    True once all rows are there, also from an earlier run; `folder` is None in memory.
    """

    def __init__(self, rows: int, limit_mib: float, key: Callable[[], str]) -> None:
        self.rows = rows
        self.limit_mib = limit_mib
        self.key = key
        self.levels: list[Tensor] = []
        self.filled = 0
        self.complete = False
        self.folder: Path | None = None

    def append(self, maps: Sequence[Tensor]) -> None:
        """Add a batch of maps, each (B, ...); OSError if the disk has no room."""
        if not self.levels:
            self._make(maps)
        if self.complete:
            return
        count = len(maps[0])
        for level, new in zip(self.levels, maps, strict=True):
            if level.shape[1:] != new.shape[1:]:
                raise ValueError(
                    "images of several sizes have features of several sizes, which "
                    "cannot be kept. Pass head_start='calibrate' and "
                    "cache_features=False, or cut the images to one size."
                )
            level[self.filled : self.filled + count] = new.to("cpu")
        self.filled += count
        if self.filled == self.rows:
            self._finish()

    def row(self, index: int) -> list[Tensor]:
        """The maps of one row."""
        return [level[index] for level in self.levels]

    def _make(self, maps: Sequence[Tensor]) -> None:
        row = sum(m[0].numel() * m.element_size() for m in maps)
        shapes = [(self.rows, *m.shape[1:]) for m in maps]
        if row * self.rows <= self.limit_mib * MIB:
            self.levels = [
                torch.empty(s, dtype=m.dtype) for s, m in zip(shapes, maps, strict=True)
            ]
            return
        self.folder = cache_folder() / "features" / self.key()
        if self.folder.is_dir():  # an earlier run made it
            self.complete = True
            self._open(self.folder)
            return
        self.unfinished = self.folder.with_suffix(f".part{os.getpid()}")
        self.unfinished.mkdir(parents=True, exist_ok=True)
        _check_room(self.unfinished, row * self.rows)
        for number, (shape, m) in enumerate(zip(shapes, maps, strict=True)):
            kind = m.numpy(force=True).dtype
            path = self.unfinished / f"{number}.npy"
            array = open_memmap(path, mode="w+", dtype=kind, shape=shape)
            self.levels.append(torch.from_numpy(array))

    def _finish(self) -> None:
        self.complete = True
        if self.folder is None:
            return
        self.levels = []  # the files are closed before they get their name
        if self.folder.exists():  # another process was faster
            shutil.rmtree(self.unfinished)
        else:
            os.replace(self.unfinished, self.folder)
        self._open(self.folder)

    def _open(self, folder: Path) -> None:
        files = sorted(folder.glob("*.npy"), key=lambda path: int(path.stem))
        # "c": what is written stays in this process; torch wants arrays it may write
        arrays = [np.load(path, mmap_mode="c", allow_pickle=False) for path in files]
        self.levels = [torch.from_numpy(array) for array in arrays]


def store_key(model: Model, dataset: ChipDataset, **more: Any) -> str:
    """Hash of all that maps depend on: weights, preprocessing, bands, pixels, ..."""
    backbone, table = model.backbone, dataset.table
    files = [
        Path(table.reader.folder) / name
        for row in dataset.rows
        for name in (table.files["image"][row], table.files["image_after"][row])
        if name
    ]
    facts = {
        "network": backbone.weights_hash(),
        "around it": _hash(
            t for n, t in backbone.state_dict().items() if not n.startswith("model.")
        ),
        "normalisation": _hash([backbone.mean, backbone.std]),
        "scale": [backbone.normalise, backbone.card.normalisation.scale],
        "bands": backbone.bands,
        "reads": [model.task, model.fusion, model.factor, model.decoder.reads],
        "pixels": [
            (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files
        ],
        "meta": [t[dataset.rows].tobytes().hex() for t in (table.date, table.lonlat)],
        **more,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        shutil.rmtree(folder)
        raise OSError(
            f"the maps of this data set need {needed / MIB:,.0f} MiB on disk, and "
            f"{folder.parent} has {free / MIB:,.0f} free. Point GEOPEFT_CACHE at a "
            "larger disk, pass cache_features=False to fit, or take a smaller data set."
        )
