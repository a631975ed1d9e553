"""The area of applicability: where a model can be trusted.

The dissimilarity index of a place is its distance, in the feature space of the
backbone, to the nearest training patch, divided by the mean distance between training
patches. The area of applicability is where it is no larger than between training folds.

As in the paper: the index, and the threshold, the upper whisker (largest value within
1.5 interquartile ranges above the third quartile) of the training data's index with the
nearest neighbour in another fold.
Ours: the space. The paper uses the predictors, weighted by their importance in a
random forest; here it is the backbone's last map, adapter included, each channel scaled
to unit variance over the training patches. Folds are regions, or blocks of touching
chips where there is only one region. Large training sets are subsampled.

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
from geopeft_kit.data.splits import spatial_blocks
from geopeft_kit.decoders.neck import pad_to_multiple
from geopeft_kit.devices import moved
from geopeft_kit.training.hardware import choose_device

if TYPE_CHECKING:
    from geopeft_kit.backbones.base import Backbone, Meta
    from geopeft_kit.data.chips import ChipData
    from geopeft_kit.model import Model


def area_of_applicability(
    model: Model,
    data: ChipData,
    split: str = "train",
    samples: int = 4000,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> AreaOfApplicability:
    """The area of applicability of a model, from its training chips.

    Args:
        model: A trained model, with its active adapter.
        data: The data it was trained on.
        split: The chips that count as known.
        samples: Patches of these that are kept, drawn at random.
        seed: Of the draw.
        device: Where to compute.

    Returns:
        A module: call it on images for their dissimilarity, or pass it to
        `gk.predict_scene` for a map of a scene.

    Raises:
        ValueError: The split has no chips or a single fold, all patches are alike, or
            the model compares two dates.
    """
    if getattr(model, "task", "") == "change":
        raise ValueError(
            "the area of applicability is not defined for a change model, which has "
            "two dates. Pass a model for one date."
        )
    if samples < 2:
        raise ValueError(f"samples is {samples}; take 2 or more, for instance 4000.")
    model.to(choose_device(device))  # the decoder too, for later use
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

    Args:
        backbone: Images -> features.
        features: (N, D) of training patches.
        folds: (N,) fold of each patch.

    Attributes:
        threshold: Largest dissimilarity inside the area.
        mean_distance: Mean distance between training patches, in standard deviations.
        training_dissimilarity: (N,) the values that the threshold is computed from.
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
        """Dissimilarity (B, 1, H, W), on the CPU, of images (B, C, H, W).

        It is 0 on a training patch; all pixels of a patch share its value.
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
        """Whether each pixel is in the area, (B, H, W) bool on the CPU."""
        return self(image, meta).squeeze(1) <= self.threshold

    def __repr__(self) -> str:
        return (
            f"AreaOfApplicability({len(self.known)} training patches; up to a "
            f"dissimilarity of {self.threshold:.2f})"
        )


def _distances_between(known: Tensor, folds: Tensor) -> tuple[float, Tensor]:
    """Mean distance over all pairs, and (N,) the distance to the nearest other fold."""
    total, nearest = 0.0, []
    for rows in torch.arange(len(known)).split(1024):
        distances = torch.cdist(known[rows], known)
        distances[torch.arange(len(rows)), rows] = 0.0  # not 0 by rounding
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
