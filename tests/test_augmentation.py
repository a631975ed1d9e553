"""Augmentation: image and mask move together, colour stays where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from test_data import HLS, INFO, image, toy_chips
from torch import nn
from torchgeo.transforms import RandomGrayscale
from toy import toy_data

import geopeft_kit as gk
from geopeft_kit.data import write_chip_folder
from geopeft_kit.data.augmentation import Augmentation

GEOMETRY = [
    K.RandomHorizontalFlip(p=0.5),
    K.RandomRotation(40.0, p=1.0),
    K.RandomAffine(10.0, translate=(0.2, 0.2), scale=(0.7, 1.3), p=1.0),
    K.RandomResizedCrop((32, 32), scale=(0.4, 0.9), p=1.0),
    K.RandomPerspective(0.3, p=1.0),
]


@pytest.mark.parametrize("transform", GEOMETRY, ids=lambda t: type(t).__name__)
def test_image_and_mask_move_together(transform: nn.Module) -> None:
    """Where a smooth image says left or right of an edge, so does the mask."""
    ramp = torch.linspace(0.0, 1.0, 32).expand(6, 32, 32)
    truth = (ramp[0] > 0.5).long()
    augment = Augmentation([transform], HLS)
    moved = False
    for seed in range(8):
        out, mask = augment(ramp.clone(), truth.clone(), (seed,), 255)
        assert mask is not None and mask.dtype == torch.int64
        assert set(mask.unique().tolist()) <= {0, 1, 255}
        clear = ((out[0] - 0.5).abs() > 0.06) & (mask != 255) & (out[0] > 0.02)
        assert torch.equal(mask[clear], (out[0] > 0.5).long()[clear])
        assert (out[:, mask == 255] == 0).all()
        assert torch.equal(out[0], out[5])
        moved |= not torch.equal(mask, truth)
    assert moved


def test_colour_meets_the_named_bands_alone() -> None:
    picture = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4
    bright = K.RandomBrightness((1.3, 1.3), p=1.0)
    out, _ = Augmentation([bright], HLS)(picture.clone(), None, (0,), 255)
    changed = (out != picture).flatten(1).any(1).tolist()
    assert changed == [True] * 3 + [False] * 3
    out, _ = Augmentation([bright], HLS, ["NIR_NARROW"])(
        picture.clone(), None, (0,), 255
    )
    assert (out != picture).flatten(1).any(1).tolist() == [False] * 3 + [True] + [
        False
    ] * 2
    torch.testing.assert_close(out[3], picture[3] + 0.3)
    # hue means red, green and blue, whatever else is named
    hue = K.ColorJiggle(0.0, 0.0, 0.0, 0.4, p=1.0)
    out, _ = Augmentation([hue], HLS, HLS)(picture.clone(), None, (0,), 255)
    assert torch.equal(out[3:], picture[3:]) and not torch.equal(out[:3], picture[:3])


def test_photographic_transforms_see_red_first() -> None:
    picture = torch.zeros(6, 8, 8)
    picture[2] = 1.0  # red is the third band of HLS
    grey = K.RandomGrayscale(p=1.0)
    out, _ = Augmentation([grey], HLS)(picture, None, (0,), 255)
    torch.testing.assert_close(out[:3], torch.full((3, 8, 8), 0.299), atol=1e-3, rtol=0)
    weights = torch.tensor([0.2, 0.3, 0.5])
    out, _ = Augmentation([RandomGrayscale(weights, p=1.0)], HLS)(
        picture, None, (0,), 255
    )
    assert torch.equal(out[3:], picture[3:])


def test_a_change_pair_moves_and_shines_as_one() -> None:
    pair = torch.rand(6, 1, 16, 16).expand(6, 2, 16, 16) * 0.4
    augment = Augmentation(
        [K.RandomRotation(30.0, p=1.0), K.RandomContrast((0.5, 1.5), p=1.0)], HLS
    )
    out, _ = augment(pair.clone(), torch.zeros(16, 16).long(), (4,), 255)
    assert out.shape == (6, 2, 16, 16)
    torch.testing.assert_close(out[:, 0], out[:, 1])


def test_regression_masks_have_nan_outside() -> None:
    far = K.RandomAffine(0.0, translate=(0.5, 0.5), p=1.0)
    _, mask = Augmentation([far], HLS)(
        torch.rand(6, 16, 16), torch.ones(16, 16), (1,), np.nan
    )
    assert mask is not None
    assert mask.isnan().any() and (mask[~mask.isnan()] == 1).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chip_folder(tmp_path / "toy", toy_chips(), INFO)


def epoch(data: gk.ChipData, number: int) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [batch["image"] for batch in loader]


def jittered(folder: Path, **changes: Any) -> gk.ChipData:
    transforms = [K.RandomRotation(90.0, p=1.0), K.RandomBrightness((0.8, 1.2))]
    given = {"test_regions": ["a"], "augment": transforms, "batch_size": 4}
    return gk.ChipData(folder, **given | changes)


def test_draws_depend_on_seed_and_epoch_alone(folder: Path) -> None:
    one = jittered(folder)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch(one, 3)
    assert torch.equal(state, torch.get_rng_state()), "dropout keeps its own stream"
    torch.manual_seed(2)
    resumed = epoch(jittered(folder), 3)  # a new process that begins at epoch 3
    assert all(torch.equal(a, b) for a, b in zip(first, resumed, strict=True))
    assert not torch.equal(first[0], epoch(one, 4)[0])
    assert not torch.equal(first[0], epoch(jittered(folder, seed=1), 3)[0])


@pytest.mark.slow
def test_worker_processes_draw_the_same(folder: Path) -> None:
    first = epoch(jittered(folder), 3)
    workers = epoch(jittered(folder, num_workers=2), 3)
    assert all(torch.equal(a, b) for a, b in zip(first, workers, strict=True))


def test_only_training_chips_are_augmented(folder: Path) -> None:
    data = gk.ChipData(
        folder, test_regions=["a"], augment=[K.RandomRotation((90.0, 90.0), p=1.0)]
    )
    assert data.augment is True
    plain = torch.tensor(image(0) * 1e-4, dtype=torch.float32)
    torch.testing.assert_close(data.dataset("test")[0]["image"], plain)
    still = next(iter(data.dataloader("train", augment=False)))["image"]
    assert not torch.equal(still, next(iter(data.train_dataloader()))["image"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"augment": [nn.ReLU()]}, TypeError, "ReLU is neither"),
        ({"augment": [K.RandomBrightness()], "bands": ["SWIR_1"]}, ValueError,
         "wants RED, GREEN, BLUE, but the images have SWIR_1"),
        ({"augment": [K.RandomBrightness()], "colour_bands": ["VV"]}, ValueError,
         "VV, which is a radar layer"),
        ({"augment": [K.RandomBrightness()], "colour_bands": ["teal"]}, ValueError,
         "unknown band"),
    ],
)  # fmt: skip
def test_what_is_refused(folder: Path, given: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        gk.ChipData(folder, test_regions=["a"], **given)


def test_a_size_that_changes_is_refused(folder: Path) -> None:
    crop = K.RandomResizedCrop((8, 8), p=1.0)
    data = gk.ChipData(folder, test_regions=["a"], augment=[crop])
    with pytest.raises(ValueError, match=r"\(8, 8\) of \(16, 16\)"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("lever", ["cache_features", "cache_prefix"])
def test_what_never_repeats_is_not_cached(tmp_path: Path, lever: str) -> None:
    toy_data(tmp_path)
    flips = [K.RandomHorizontalFlip(p=0.5)]
    data = gk.ChipData(tmp_path, split="index", augment=flips)
    backbone = gk.load_backbone("geopeft_tiny", data.bands, weights=None)
    gk.attach(backbone, "frozen")
    model = gk.build_model(backbone, "linear", data.task, data.num_classes)
    with pytest.raises(ValueError, match="draw new ones every epoch"):
        gk.fit(model, data, epochs=1, progress=False, **{lever: True})
