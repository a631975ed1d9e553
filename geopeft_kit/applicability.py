"""Where a model may be believed: the area of applicability.

A network answers everywhere, also on ground that resembles nothing it was trained on.
How strange a place is can be measured: its distance, in the feature space of the
backbone, to the nearest training patch, divided by how far training patches lie from
each other on average. This is the dissimilarity index. The area of applicability is
where it is no larger than between training regions.

As in the paper: the index (minimum distance over mean distance), a threshold from the
training data themselves, where the nearest neighbour has to be of another fold, and
the upper whisker (largest value within 1.5 interquartile ranges above the third
quartile) as that threshold.
Ours: the space. The paper takes the predictors, scaled and weighted by their importance
in a random forest; here it is the backbone's last map, adapter included, each channel
scaled to unit variance over the training patches, unweighted. Folds are regions, and
where there is only one, blocks of touching chips. Large training sets are thinned out
at random.

Taught in `notebooks/09_unseen_regions.ipynb`.

Source:
    Meyer and Pebesma 2021, "Predicting into unknown space? Estimating the area of
    applicability of spatial prediction models", doi:10.1111/2041-210X.13650.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from geopeft_kit.data.batch import Batch

from .data.splits import spatial_blocks
from .decoders.neck import pad_to_multiple
from .devices import moved
from .training.hardware import choose_device

if TYPE_CHECKING:
    from .backbones.base import Backbone, Meta
    from .data.chips import ChipData
    from .model import Model


def area_of_applicability(
    model: Model,
    data: ChipData,
    split: str = "train",
    samples: int = 4000,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> AreaOfApplicability:
    """Learn from the training chips what is familiar to a model.

    Args:
        model: A trained model; its backbone with the adapter that is active now.
        data: The data it was trained on.
        split: Which of its chips count as known.
        samples: Patches of these that are kept, drawn at random.
        seed: Of the draw.
        device: Where to compute.

    Returns:
        The area: call it on images for their dissimilarity, hand it to
        `gk.predict_scene` for a map of a scene.

    Raises:
        ValueError: The split has no chips or a single fold, all patches are alike, or
            the model compares two dates.
    """
    if getattr(model, "task", "") == "change":
        raise ValueError(
            "the area of applicability of a change model is not defined here: it has "
            "two dates. Pass a model for one date."
        )
    if samples < 2:
        raise ValueError(f"samples is {samples}; take 2 or more, 4000 is usual.")
    model.to(choose_device(device))  # whole: a decoder left behind could not go on
    features, folds = _training_patches(model.backbone, data, split)
    if len(features) > samples:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(features), generator=generator)[:samples]
        features, folds = features[kept], folds[kept]
    if len(folds.unique()) < 2:
        raise ValueError(
            f"the patches of split {split!r} are of one region and one block, so there "
            "is no other fold to compare with. Use more training chips."
        )
    return AreaOfApplicability(model.backbone, features, folds)


def _training_patches(
    backbone: Backbone, data: ChipData, split: str
) -> tuple[Tensor, Tensor]:
    """(N, D) features of all patches of a split, and the number of their fold."""
    rows = data.dataset(split).rows
    index = data.index.iloc[rows]
    folds = index["region"].astype("category").cat.codes.to_numpy()
    if len(np.unique(folds)) < 2:
        folds = spatial_blocks(index)
    found, numbers, first = [], [], 0
    for batch in map(Batch.of, data.dataloader(split)):
        features = _patches(backbone, batch.image, batch.meta)
        count, width = features.shape[:2]
        found.append(features.flatten(2).transpose(1, 2).reshape(-1, width))
        own = torch.from_numpy(np.array(folds[first : first + count], dtype=np.int64))
        numbers.append(own.repeat_interleave(features.shape[2] * features.shape[3]))
        first += count
    return torch.cat(found), torch.cat(numbers)


def _patches(backbone: Backbone, image: Tensor, meta: Meta | None = None) -> Tensor:
    """Last map of the backbone, (B, D, h, w), without gradients, in evaluation mode."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            padded = pad_to_multiple(image, max(backbone.strides))
            return backbone(padded, meta)[-1].float()
    finally:
        backbone.train(training)


class AreaOfApplicability(nn.Module):
    """Dissimilarity of images to training patches; made by `area_of_applicability`.

    As a module with the task "regression" it can be given to `gk.predict_scene`.

    Args:
        backbone: Images -> features.
        features: (N, D) of training patches.
        folds: (N,) numbers; the nearest neighbour that sets the threshold is of
            another fold.

    Attributes:
        threshold: Largest dissimilarity that still counts as familiar.
        mean_distance: Mean distance between training patches, in standard deviations.
        training_dissimilarity: (N,) the values that the threshold comes from.

    Raises:
        ValueError: All patches are alike.
    """

    task = "regression"
    mean: Tensor
    spread: Tensor
    known: Tensor

    def __init__(self, backbone: Backbone, features: Tensor, folds: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        mean, spread = features.mean(dim=0), features.std(dim=0)
        varies = spread > 1e-6 * spread.max()
        if not bool(varies.any()):
            raise ValueError(
                f"all {len(features)} training patches have the same features, so "
                "nothing can be told apart. Check that the images are not constant."
            )
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread.masked_fill(~varies, float("inf")))
        known = (features - self.mean) / self.spread
        self.register_buffer("known", known)
        own, other = _distances_between(known, folds)
        self.mean_distance = own
        self.training_dissimilarity = other / own
        self.threshold = upper_whisker(self.training_dissimilarity.numpy())

    def forward(self, image: Tensor, meta: Meta | None = None) -> Tensor:
        """Dissimilarity of every pixel, on the CPU.

        Args:
            image: (B, C, H, W) reflectance 0-1.
            meta: As for the model.

        Returns:
            (B, 1, H, W), 0 on a training patch; all pixels of a patch share its value.
        """
        maps = _patches(self.backbone, image, meta)  # (B, D, h, w)
        maps = moved(maps, self.known.device)
        batch, width, rows, columns = maps.shape
        points = maps.flatten(2).transpose(1, 2).reshape(-1, width)  # (B*h*w, D)
        points = (points - self.mean) / self.spread
        nearest = torch.cat(
            [torch.cdist(part, self.known).amin(dim=1) for part in points.split(1024)]
        )
        index = (nearest / self.mean_distance).reshape(batch, 1, rows, columns)
        height, breadth = image.shape[-2:]
        grid = max(self.backbone.strides)
        padded = (-(-height // grid) * grid, -(-breadth // grid) * grid)
        pixels = nn.functional.interpolate(index, padded, mode="nearest")
        return pixels[..., :height, :breadth].cpu()

    def inside(self, image: Tensor, meta: Meta | None = None) -> Tensor:
        """Whether each pixel lies in the area of applicability, (B, H, W) bool.

        On the CPU.
        """
        return self(image, meta).squeeze(1) <= self.threshold

    def __repr__(self) -> str:
        return (
            f"AreaOfApplicability({len(self.known)} training patches; familiar up to a "
            f"dissimilarity of {self.threshold:.2f})"
        )


def _distances_between(known: Tensor, folds: Tensor) -> tuple[float, Tensor]:
    """Mean distance over all pairs, and (N,) the distance to the nearest other fold."""
    total, nearest = 0.0, []
    for rows in torch.arange(len(known)).split(1024):
        distances = torch.cdist(known[rows], known)
        distances[torch.arange(len(rows)), rows] = 0.0  # rounding leaves a little
        total += float(distances.double().sum())
        same = folds[rows][:, None] == folds[None]
        nearest.append(distances.masked_fill(same, float("inf")).amin(dim=1))
    pairs = len(known) * (len(known) - 1)
    return total / pairs, torch.cat(nearest)


def upper_whisker(values: Any) -> float:
    """The largest of (N,) values that is at most Q3 + 1.5 (Q3 - Q1)."""
    values = np.asarray(values, dtype=float)
    first, third = np.percentile(values, [25, 75])
    return float(values[values <= third + 1.5 * (third - first)].max())
