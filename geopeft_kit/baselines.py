"""Baselines without a network: constant, index threshold, pixel statistics, bicubic.

A foundation model has to beat these before it is worth its memory. `evaluate`,
`predict_scene` and the map take them like any other model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geopeft_kit.data.chips import ChipData
from geopeft_kit.devices import on_own_device
from geopeft_kit.indices import spectral_indices

# Whether the index of class 1 is above the threshold.
ABOVE = {"MNDWI": True, "NBR": False, "NDVI": True}


class IndexThreshold(nn.Module):
    """A normalised difference of two bands and the threshold that fits training best.

    The threshold maximises the intersection over union of class 1 on the training
    split; class 1 is the target (water, burn scar).

    Args:
        data: Two-class segmentation data.
        index: "MNDWI", "NBR" or "NDVI", see `geopeft_kit.indices`.

    Raises:
        ValueError: The index is unknown, a band is missing, or there are not two
            classes.
    """

    def __init__(self, data: ChipData, index: str) -> None:
        super().__init__()
        if index not in ABOVE:
            raise ValueError(f"index is {index!r}; allowed are {', '.join(ABOVE)}.")
        if data.task != "segmentation" or data.num_classes != 2:
            raise ValueError(
                f"an index threshold needs segmentation with 2 classes; the data has "
                f"task {data.task!r} and {data.num_classes} classes."
            )
        self.task, self.num_classes, self.bands = data.task, 2, tuple(data.bands)
        self.name, self.above = index, ABOVE[index]
        self.threshold = self._fit(data)

    def forward(self, image: Tensor, meta: object = None) -> Tensor:
        """(B,C,H,W) reflectance -> (B,2,H,W) logits, positive on one side."""
        margin = (self.index(image) - self.threshold) * (1 if self.above else -1)
        return torch.stack([-margin, margin], dim=1)

    def index(self, image: Tensor) -> Tensor:
        """The normalised difference of each pixel, (B,H,W)."""
        return spectral_indices(image, self.bands, [self.name])[:, 0]

    def _fit(self, data: ChipData) -> float:
        values, labels = [], []
        for batch in data.dataloader("train", augment=False):
            valid = batch["mask"] != data.ignore_index
            values.append(self.index(batch["image"])[valid])
            labels.append(batch["mask"][valid] == 1)
        value, label = torch.cat(values), torch.cat(labels)
        order = value.argsort(descending=self.above)
        hits = label[order].cumsum(0)  # true positives when the first n are taken
        taken = torch.arange(1, len(hits) + 1)
        overlap = hits / (taken + label.sum() - hits)
        return float(value[order[overlap.argmax()]])


class Constant(nn.Module):
    """The same answer everywhere: the training mean, or the most frequent class.

    A model that scores no better has learnt nothing from its labels.

    Args:
        data: Regression, segmentation or classification data.

    Raises:
        ValueError: The task is another.
    """

    def __init__(self, data: ChipData) -> None:
        super().__init__()
        if data.task not in ("regression", "segmentation", "classification"):
            raise ValueError(
                "a constant answer exists for regression, segmentation and "
                f"classification; the data's task is {data.task!r}."
            )
        self.task, self.num_classes = data.task, data.num_classes
        self.bands, target = tuple(data.bands), data.info.target
        batches = data.dataloader("train", augment=False)
        values = torch.cat([batch[target].flatten() for batch in batches])
        if self.task == "regression":
            self.answer = values[torch.isfinite(values)].double().mean().float()[None]
        else:
            values = values[values != data.ignore_index]
            counts = torch.bincount(values, minlength=self.num_classes)
            self.answer = F.one_hot(counts.argmax(), self.num_classes).float()

    def forward(self, image: Tensor, meta: object = None) -> Tensor:
        """(B,C,H,W) reflectance -> (B,1,H,W) values, or logits (B,K,H,W) or (B,K)."""
        if self.task == "classification":
            return self.answer.to(image).expand(len(image), -1)
        shape = (len(image), -1, *image.shape[2:])
        return self.answer.to(image)[:, None, None].expand(shape)


class PixelStatistics(nn.Module):
    """Logistic regression on pixel values, without any spatial features.

    Pixels are described by their bands and the bands' mean and spread in a window,
    whole images (classification) by mean, spread and quantiles of each band.

    Args:
        data: Segmentation or classification data; its training split is read.
        window: Side of the window in pixels, odd.
        samples: Pixels that the regression is fitted on, drawn evenly from the chips.
        seed: Which pixels are drawn.

    Raises:
        ValueError: The task is neither segmentation nor classification, or the window
            is not odd.
    """

    def __init__(
        self, data: ChipData, window: int = 5, samples: int = 50_000, seed: int = 0
    ) -> None:
        super().__init__()
        if data.task not in ("segmentation", "classification"):
            raise ValueError(
                "pixel statistics exist for segmentation and classification; the "
                f"data's task is {data.task!r}."
            )
        if window < 1 or window % 2 != 1:
            raise ValueError(f"window is {window}; it must be odd, 1 or more.")
        self.task, self.num_classes = data.task, data.num_classes
        self.bands, self.window = tuple(data.bands), window
        self.mean: Tensor
        self.std: Tensor
        features, labels = self._training_table(data, samples, seed)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0).clamp(min=1e-6))
        self.regression = fit_logistic(
            (features - self.mean) / self.std, labels, self.num_classes
        )

    @on_own_device
    def forward(self, image: Tensor, meta: object = None) -> Tensor:
        """(B,C,H,W) reflectance -> (B,K,H,W) or (B,K) logits."""
        features = (self.describe(image) - self.mean) / self.std
        logits = self.regression(features)
        return logits.movedim(-1, 1)

    def describe(self, image: Tensor) -> Tensor:
        """The statistics, (B,H,W,F) for segmentation and (B,F) for classification."""
        if self.task == "segmentation":
            margin = [self.window // 2] * 4
            padded = F.pad(image, margin, mode="replicate")
            mean = F.avg_pool2d(padded, self.window, stride=1)
            square = F.avg_pool2d(padded.square(), self.window, stride=1)
            spread = (square - mean.square()).clamp(min=0).sqrt()
            return torch.cat([image, mean, spread], dim=1).movedim(1, -1)
        pixels = image.flatten(2)  # (B,C,H*W)
        marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=image.device)
        quantiles = torch.quantile(pixels, marks, dim=2)  # (5,B,C)
        parts = [pixels.mean(2), pixels.std(2), *quantiles]
        return torch.cat(parts, dim=1)

    def _training_table(
        self, data: ChipData, samples: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        per_chip = max(1, samples // len(data.dataset("train")))
        features, labels = [], []
        for batch in data.dataloader("train", augment=False):
            table = self.describe(batch["image"])
            if self.task == "classification":
                features.append(table)
                labels.append(batch["label"])
                continue
            valid = (batch["mask"] != data.ignore_index).flatten()
            rows = valid.nonzero().squeeze(1)
            chosen = torch.randperm(len(rows), generator=generator)
            rows = rows[chosen[: per_chip * len(batch["mask"])]]
            features.append(table.flatten(0, 2)[rows])
            labels.append(batch["mask"].flatten()[rows])
        return torch.cat(features), torch.cat(labels).long()


class Bicubic(nn.Module):
    """Cubic interpolation, the baseline of super-resolution.

    Args:
        data: Of task "super_resolution", see `ChipData.for_super_resolution`.

    Raises:
        ValueError: The task is another.
    """

    def __init__(self, data: ChipData) -> None:
        super().__init__()
        if data.task != "super_resolution":
            raise ValueError(
                f"bicubic enlarging serves super-resolution; the data's task is "
                f"{data.task!r}. Use data.for_super_resolution(factor=2)."
            )
        self.task, self.num_classes = data.task, data.num_classes
        self.bands, self.factor = tuple(data.bands), data.factor

    def forward(self, image: Tensor, meta: object = None) -> Tensor:
        """(B,C,H,W) -> (B,C,r*H,r*W)."""
        return F.interpolate(image, scale_factor=self.factor, mode="bicubic")


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float = 1e-4
) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS: a frozen linear layer F -> K.

    `features` (N,F) are standardised, `labels` (N,) are class numbers; `penalty` weighs
    the squared coefficients.
    """
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(
        layer.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(layer(features), labels)
        loss = loss + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return layer.requires_grad_(False)
