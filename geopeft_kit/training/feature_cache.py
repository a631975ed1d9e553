"""Feature cache: what is frozen needs to see each image only once.

With nothing trainable in the backbone, every epoch would compute the same feature maps
again. `FeatureCache` computes them once and serves them as a data set, so that later
epochs cost the decoder alone. Flips and quarter turns are a finite set: with them there
are eight variants of each image, and each is computed once. Taught in notebooks 02
and 08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from geopeft_kit.data.batch import images_on
from geopeft_kit.data.loading import (
    AugmentedKey,
    drawn_symmetry,
    symmetry,
)
from geopeft_kit.model import Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.map_store import MapStore, store_key
from geopeft_kit.training.prefix_cache import Prefix

LIMIT_MIB = 4096.0
SYMMETRIES = 8

Compute = Callable[[Mapping[str, Any]], Sequence[Tensor]]
"""A batch with images on the CPU -> the maps to keep, each (B, ...)."""


class FeatureCache(Dataset):
    """Feature maps of a data set, with the targets beside them.

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
        self.name = "prefix" if prefix else "features"
        self.variants = SYMMETRIES if augment else 1
        self.samples: list[dict[str, Any]] = []
        self.size: tuple[int, int] = (0, 0)
        kept = prefix.kept if prefix else "features"
        self.store = MapStore(
            len(chips) * self.variants,
            limit_mib,
            lambda: store_key(model, chips, variants=self.variants, kept=kept),
        )
        compute: Compute = lambda batch: model.features(*images_on(batch, device))  # noqa: E731
        if prefix is not None:
            compute = lambda batch: prefix.record(batch, device)  # noqa: E731
        training = model.training
        model.eval()
        try:
            # no_grad rather than inference_mode, whose tensors could not train
            with torch.no_grad():
                for number in range(self.variants):
                    batches = progress_bar(
                        loader, progress, desc=self.name, leave=False, delay=1
                    )
                    self._read(batches, number, compute)
        finally:
            model.train(training)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | AugmentedKey) -> dict[str, Any]:
        """One sample; an `AugmentedKey` draws its symmetry as `ChipDataset` does."""
        augmented = isinstance(key, AugmentedKey)
        position = key.position if isinstance(key, AugmentedKey) else key
        number = drawn_symmetry(key) if isinstance(key, AugmentedKey) else 0
        sample = dict(self.samples[position])
        if augmented and "mask" in sample:
            sample["mask"] = symmetry([sample["mask"]], number)[0]
        row = number * len(self.samples) + position
        return sample | {self.name: self.store.row(row)}

    @property
    def maps(self) -> list[Tensor]:
        """Each level's maps of the whole data set as it is, (N, C_i, h, w)."""
        return [level[: len(self.samples)] for level in self.store.levels]

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of cached maps, with the image size that outputs are made for."""
        batch = default_collate(samples)
        batch["size"] = self.size
        return batch

    def _read(
        self, batches: Iterable[dict[str, Any]], number: int, compute: Compute
    ) -> None:
        """One pass over the images in one of their symmetries."""
        for batch in batches:
            if number == 0:
                self._keep_targets(batch)
            if self.store.complete and number:
                return
            if self.store.complete:
                continue
            images = batch["image"]
            turned = symmetry([images], number)[0] if number else images
            self.store.append(compute({**batch, "image": turned}))

    def _keep_targets(self, batch: Mapping[str, Any]) -> None:
        self.size = tuple(batch["image"].shape[-2:])
        target = "mask" if "mask" in batch else "label"
        for index, region in enumerate(batch["region"]):
            # clone(), or each sample would keep its whole batch alive
            kept = {target: batch[target][index].clone(), "region": region}
            self.samples.append(kept)
