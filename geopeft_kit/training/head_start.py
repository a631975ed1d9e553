"""The head start: standardised features, and a head that starts from the probe.

A fresh head on raw features stays under-trained long after the backbone has changed,
which misleads about every method. So features are standardised per channel first, and a
linear head is trained alone before anything else: linear probing, then fine-tuning
(Kumar et al. 2022, arXiv 2202.10054). Taught in notebook 02.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from geopeft_kit.data.batch import Batch
from geopeft_kit.data.chips import ChipData
from geopeft_kit.devices import moved
from geopeft_kit.model import WHOLE_IMAGE_TASKS, Model
from geopeft_kit.progress import progress_bar
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.plan import resolve_head_start
from geopeft_kit.training.step import Loss, make_loss, step


def start_decoder(
    model: Model,
    data: ChipData,
    device: torch.device,
    how: str = "auto",
    seed: int = 0,
    progress: bool = False,
    loss: Loss | None = None,
) -> FeatureCache | None:
    """Give the decoder its start: "probe", "calibrate" or "none".

    "auto" is "probe" for a linear decoder, else "calibrate". Returns the features of
    all training chips if a probe computed them.
    """
    how = resolve_head_start(model, how, data.one_size)
    if how == "probe":
        return start_head(model, data, device, seed=seed, progress=progress, loss=loss)
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
    there = (Batch.of(batch).to(device) for batch in batches)
    model.calibrate(model.features(batch.image, batch.meta) for batch in there)


def start_head(
    model: Model,
    data: ChipData,
    device: torch.device,
    steps: int = 400,
    batch_size: int | None = None,
    learning_rate: float = 5e-3,
    seed: int = 0,
    progress: bool = False,
    loss: Loss | None = None,
) -> FeatureCache:
    """Train the decoder alone on features of the backbone; returns those features.

    `batch_size` None takes 64 whole images, or 8 maps, which have a label for each
    pixel. `learning_rate` is the peak of the cosine.

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
    loss = loss or make_loss(model.task, data.ignore_index)
    model.train()
    for batch in progress_bar(loader, progress, desc="probe", leave=False, delay=1):
        value = step(model, Batch.of(batch).to(device), loss)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return cache
