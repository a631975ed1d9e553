"""The head start: standardised features, and a head that starts from the probe.

A fresh head on raw features is under-trained long after the backbone has moved, and
then tells false stories about every method. So features are standardised per channel
first, and a linear head is trained alone before anything else trains: linear probing,
then fine-tuning (Kumar et al. 2022, arXiv 2202.10054). Taught in notebook 02.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from geopeft_kit.data.batch import batch_target, images_on
from geopeft_kit.data.chips import ChipData
from geopeft_kit.devices import moved
from geopeft_kit.model import WHOLE_IMAGE_TASKS, Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.task import compute_loss


def resolve_head_start(model: Model, how: str, one_size: bool = True) -> str:
    """What "auto" means for a model: "probe" or "calibrate"; other words stay.

    Features of images that are not of `one_size` cannot be kept for a probe.
    """
    if how != "auto":
        return how
    return "probe" if model.has_linear_head and one_size else "calibrate"


def start_decoder(
    model: Model,
    data: ChipData,
    device: torch.device,
    how: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> FeatureCache | None:
    """Give the decoder its start: "probe", "calibrate" or "none".

    "auto" is "probe" for a linear decoder, else "calibrate". Returns the features of
    all training chips if a probe computed them.
    """
    how = resolve_head_start(model, how, data.one_size)
    if how == "probe":
        return start_head(model, data, device, seed=seed, progress=progress)
    if how == "calibrate":
        calibrate(model, data, device, progress=progress)
    return None


def calibrate(
    model: Model,
    data: ChipData,
    device: torch.device,
    limit: int = 512,
    progress: bool = False,
) -> None:
    """Set the decoder's standardisation from features of at most `limit` chips."""
    chosen = data.subset(limit) if len(data.dataset("train")) > limit else data
    loader = chosen.dataloader("train", augment=False)
    batches = progress_bar(loader, progress, desc="features", leave=False, delay=1)
    # One batch at a time: four large maps of many chips would fill the memory.
    model.calibrate(model.features(*images_on(batch, device)) for batch in batches)


def start_head(
    model: Model,
    data: ChipData,
    device: torch.device,
    steps: int = 400,
    batch_size: int | None = None,
    learning_rate: float = 5e-3,
    seed: int = 0,
    progress: bool = False,
) -> FeatureCache:
    """Train the decoder alone, on features of the backbone as it stands.

    Args:
        model: Standardised and trained in place; its backbone does not change.
        data: Its training split is read once.
        device: Where to compute.
        steps: Optimiser steps, enough for a linear head to converge.
        batch_size: Cached samples a step; None takes 64 whole images, or 8 maps, which
            have a label for each pixel.
        learning_rate: Highest rate of a one-cycle cosine.
        seed: Order of the samples.
        progress: As for `start_decoder`.

    Returns:
        The features, so that a probe can go on from them.

    Source: the first stage of LP-FT, Kumar et al. 2022 (arXiv 2202.10054), section 3.
    """
    images = data.dataloader("train", augment=False)
    cache = FeatureCache(model, images, device, progress=progress)
    model.calibrate(moved(cache.maps, device))
    if batch_size is None:
        batch_size = 64 if model.task in WHOLE_IMAGE_TASKS else 8
    order = torch.Generator().manual_seed(seed)
    sampler = torch.utils.data.RandomSampler(
        cache, replacement=True, num_samples=steps * batch_size, generator=order
    )
    loader = DataLoader(cache, batch_size, sampler=sampler, collate_fn=cache.collate)
    parameters = [p for p in model.decoder_parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for batch in progress_bar(loader, progress, desc="probe", leave=False, delay=1):
        batch = moved(batch, device)
        output = model.from_features(batch["features"], batch["size"])
        target = batch_target(batch)
        loss = compute_loss(output, target, model.task, data.ignore_index)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return cache
