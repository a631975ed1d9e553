"""Geo-aware pretraining: reconstruct the image, predict its place and its climate.

Three heads on one backbone, as in PhilEO's paper: masked reconstruction (mean squared
error), place (longitude and latitude as sine and cosine), and climate class (cross
entropy). At teaching size: a plain loop, one device, any backbone that trains.

Paper and released code differ, and both leave details open:

- Heads. Paper, and here: image, place, climate. Code: image, place, clouds, buildings,
  land cover and the similarity of two views.
- Weights. Paper: not stated. Code: 100 for clouds and buildings, else 1. Here: 1 each
  by default.
- Masking. Paper: share not stated. Code, and here: one rectangle of 25 to 50 % of the
  image, filled with random values; the error counts over the whole image. Here the
  values have the mean and spread of each band.
- Latitude. Code: a period of 180 degrees, so that both poles are one place. Here: 360.
- Size. Theirs predicts the place from the bottleneck's vector and reconstructs with a
  decoder and a sigmoid. Here each head is one linear layer.

The paper's climate classes are Koeppen-Geiger's. In the simulated world each region has
its own climate, so place and climate carry the same information there.

Source: PhilEO on MajorTOM, arXiv 2506.14765, section III.A, and its public code
(github.com/ESA-PhiLab/PhilEO-MajorTOM); heads also in Fibaek et al. 2024, arXiv
2401.04464.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import RandomErasing

from geopeft_kit.backbones.base import Backbone
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.loading import symmetry
from geopeft_kit.devices import on_own_device
from geopeft_kit.pretraining.samples import corpus
from geopeft_kit.training.hardware import choose_device
from geopeft_kit.training.optimisers import cosine_with_warmup

HEADS = ("image", "place", "climate")


@dataclass
class GeoAwareRun:
    """The result of geo-aware pretraining.

    Attributes:
        heads: The trained heads; they are not part of the backbone.
        history: One row per step: the error of each head with a weight.
        climates: Region -> class number.
        weights: How much each head counted.
    """

    heads: GeoAwareHeads
    history: pd.DataFrame
    climates: dict[str, int]
    weights: dict[str, float]


class GeoAwareHeads(nn.Module):
    """One linear layer per head.

    The finest map rebuilds the image; the mean of the deepest predicts place and
    climate.
    """

    def __init__(self, backbone: Backbone, climates: int) -> None:
        super().__init__()
        strides, channels = backbone.strides, backbone.channels
        # of maps with one stride, as a ViT's, the deepest
        self.finest = max(i for i, s in enumerate(strides) if s == min(strides))
        pixels = len(backbone.bands) * min(strides) ** 2
        self.image = nn.Conv2d(channels[self.finest], pixels, 1)
        self.unfold = nn.PixelShuffle(min(strides))
        self.norm = nn.LayerNorm(channels[-1])
        self.place = nn.Linear(channels[-1], 4)
        self.climate = nn.Linear(channels[-1], climates)

    @on_own_device
    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Four maps -> image (B,C,H,W), place (B,4), climate logits (B,K).

        The image is in the backbone's normalised units; for the place see `to_place`.
        """
        deep = self.norm(maps[-1].mean((2, 3)))  # (B, D)
        image = self.unfold(self.image(maps[self.finest]))
        return image, self.place(deep), self.climate(deep)


def to_place(lonlat: Tensor) -> Tensor:
    """(B,2) degrees -> (B,4) sines, then cosines: continuous at 180 degrees."""
    turned = torch.deg2rad(lonlat)
    return torch.cat([turned.sin(), turned.cos()], dim=1)


def to_lonlat(place: Tensor) -> Tensor:
    """The inverse of `to_place`, also off the unit circle: (B,4) -> (B,2)."""
    sine, cosine = place.chunk(2, dim=1)
    return torch.rad2deg(torch.atan2(sine, cosine))


def pretrain_geo_aware(
    backbone: Backbone,
    data: ChipData,
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weights: Mapping[str, float] | None = None,
    climates: Mapping[str, int] | None = None,
    erase: tuple[float, float] = (0.25, 0.5),
    device: str = "auto",
    seed: int = 0,
) -> GeoAwareRun:
    """Pretrain the trainable parameters of a backbone in place, without labels.

    Args:
        backbone: From `load_backbone`; with an adapter, the adapter alone trains.
        data: Its training chips are the corpus, or all of a data set without labels;
            drawn with replacement, flipped and rotated.
        steps: Optimiser steps.
        batch_size: Chips a step.
        learning_rate: Peak rate of AdamW.
        weights: How much "image", "place" and "climate" count, 1 where not named; 0
            leaves a head out.
        climates: Region -> class number from 0; None gives each region its own.
        erase: Least and largest share of the image that a rectangle of random values
            hides.
        device: As in `fit`.
        seed: Of heads, order, rectangles and rotations.

    Returns:
        The `GeoAwareRun`.

    Raises:
        ValueError: Unknown heads or none, nothing trainable, a training chip without
            coordinates, or a region without a climate.
    """
    torch.manual_seed(seed)
    place, counts = choose_device(device), _checked(weights, data)
    climates = _climates(data, climates)
    heads = GeoAwareHeads(backbone, max(climates.values()) + 1).to(place)
    backbone.to(place).train()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "nothing trains in the backbone: its method is 'frozen'. Detach it, or "
            "attach another one."
        )
    parameters = [*trained, *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.05)
    factor = cosine_with_warmup(steps, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    hide, rows = RandomErasing(1.0, erase, value="random"), []
    for batch in _batches(data, steps, batch_size, seed):
        image = symmetry([batch["image"].to(place)], int(torch.randint(8, ())))[0]
        hidden = _hidden(image, hide)
        answers = heads(backbone(hidden))
        errors = _errors(answers, backbone.normalised(image), batch, climates)
        loss = torch.stack([counts[name] * errors[name] for name in counts]).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        rows.append({name: errors[name].item() for name in counts})
    backbone.eval()
    history = pd.DataFrame(rows).rename_axis("step").reset_index()
    return GeoAwareRun(heads.eval(), history, climates, counts)


def _hidden(image: Tensor, hide: RandomErasing) -> Tensor:
    """Each image (B,C,H,W) with a rectangle of noise of its bands' mean and spread."""
    std, mean = torch.std_mean(image, dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    unit = (image - mean) / std.clamp(min=1e-6)
    return torch.stack([hide(one) for one in unit]) * std + mean


def _errors(
    answers: tuple[Tensor, Tensor, Tensor],
    image: Tensor,
    batch: Mapping[str, Any],
    climates: Mapping[str, int],
) -> dict[str, Tensor]:
    """Error of each head that has a reference."""
    rebuilt, place, climate = answers
    device = image.device
    truth = torch.tensor([climates[region] for region in batch["region"]])
    errors = {
        "image": F.mse_loss(rebuilt, image),
        "climate": F.cross_entropy(climate, truth.to(device)),
    }
    if "lonlat" in batch:
        target = to_place(batch["lonlat"].to(device, torch.float32))
        errors["place"] = F.mse_loss(place, target)
    return errors


def _checked(weights: Mapping[str, float] | None, data: ChipData) -> dict[str, float]:
    """The weights of the heads with a weight above 0."""
    unknown = [name for name in weights or {} if name not in HEADS]
    if unknown:
        raise ValueError(f"no head {unknown[0]!r}; there are {', '.join(HEADS)}.")
    every = dict.fromkeys(HEADS, 1.0) | dict(weights or {})
    negative = [name for name, weight in every.items() if not weight >= 0]
    if negative:
        name = negative[0]
        raise ValueError(f"weight of {name!r} is {every[name]}; it must be >= 0.")
    counts = {name: weight for name, weight in every.items() if weight}
    if not counts:
        raise ValueError("all weights are 0, so nothing would be learnt.")
    if "place" in counts and not corpus(data).has_lonlat:
        raise ValueError(
            f"training chips of {data.name} are not georeferenced, so the place head "
            'has nothing to learn. Leave it out: weights={"place": 0}.'
        )
    return counts


def _climates(data: ChipData, climates: Mapping[str, int] | None) -> dict[str, int]:
    """Region -> class, for every region of the training chips."""
    chips = corpus(data)
    regions = sorted({chips.table.regions[row] for row in chips.rows})
    if climates is None:
        return {region: number for number, region in enumerate(regions)}
    missing = [region for region in regions if region not in climates]
    if missing:
        raise ValueError(
            f"climates has no class for the region {missing[0]!r}; the training chips "
            f"have {', '.join(regions)}."
        )
    return dict(climates)


def _batches(
    data: ChipData, steps: int, batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    chips = corpus(data)
    order = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(chips, True, steps * batch_size, generator=order)
    return iter(DataLoader(chips, batch_size, sampler=sampler, generator=order))
