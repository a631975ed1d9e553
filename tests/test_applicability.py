"""The dissimilarity index: zero on what was seen, large elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from scipy.spatial.distance import cdist, pdist
from toy import BANDS, toy_data

import geopeft_kit as gk
from geopeft_kit.applicability import AreaOfApplicability, upper_whisker


class Pixels(torch.nn.Module):
    """A backbone whose features are the means of patches of four by four pixels."""

    bands, strides, channels = BANDS, [4], [6]

    def forward(self, image, meta=None):
        return [torch.nn.functional.avg_pool2d(image, 4)]


class Net(torch.nn.Module):
    task = "segmentation"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pixels()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy"))


def patches(data, split="train") -> np.ndarray:
    images = torch.stack([sample["image"] for sample in data.dataset(split)])
    maps = Pixels()(images)[0]  # (N, D, h, w)
    return maps.flatten(2).transpose(1, 2).reshape(-1, maps.shape[1]).numpy()


def test_the_index_is_the_paper_s(data):
    area = gk.area_of_applicability(Net(), data, samples=10_000)
    known = patches(data)
    scaled = (known - known.mean(0)) / known.std(0, ddof=1)
    mean = pdist(scaled).mean()
    assert area.mean_distance == pytest.approx(mean, rel=1e-4)
    image = torch.rand(2, 6, 16, 24, generator=torch.Generator().manual_seed(0))
    own = Pixels()(image)[0].flatten(2).transpose(1, 2).reshape(-1, 6).numpy()
    expected = cdist((own - known.mean(0)) / known.std(0, ddof=1), scaled).min(1) / mean
    found = area(image)
    assert found.shape == (2, 1, 16, 24)
    assert found[:, 0, ::4, ::4].reshape(-1).numpy() == pytest.approx(
        expected, rel=1e-3
    )
    assert (found[..., 0, 0] == found[..., 3, 3]).all()


def test_the_threshold_is_the_whisker_over_other_folds():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 5, generator=generator)
    folds = torch.arange(60) % 3
    area = AreaOfApplicability(Pixels(), features, folds)
    scaled = (features - features.mean(0)) / features.std(0)
    distances = cdist(scaled.numpy(), scaled.numpy())
    distances[folds[:, None].numpy() == folds[None].numpy()] = np.inf
    index = distances.min(1) / pdist(scaled.numpy()).mean()
    assert area.training_dissimilarity.numpy() == pytest.approx(index, rel=1e-4)
    first, third = np.percentile(index, [25, 75])
    inside = index[index <= third + 1.5 * (third - first)]
    assert area.threshold == pytest.approx(inside.max(), rel=1e-4)
    assert upper_whisker([1, 2, 3, 4, 100]) == 4


def test_training_ground_is_inside_and_strange_ground_is_not(data):
    area = gk.area_of_applicability(Net(), data, samples=10_000)
    seen = torch.stack([sample["image"] for sample in data.dataset("train")])
    assert area(seen).abs().max() < 1e-2
    assert area.inside(seen).all()
    strange = seen.flip(1) * 3 + 0.5
    assert not area.inside(strange).any()


def test_sizes_off_the_grid_and_no_trace_on_the_model(data):
    model = gk.build_model(gk.load_backbone("geopeft_tiny", weights=None))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    area = gk.area_of_applicability(model, data.subset(4), samples=60)
    assert area(torch.rand(1, 6, 21, 30)).shape == (1, 1, 21, 30)
    assert len(area.known) == 60 and "60 training patches" in repr(area)
    assert model.training and model.backbone.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    again = gk.area_of_applicability(model, data.subset(4), samples=60)
    assert torch.equal(area.known, again.known)


def test_a_scene_gets_a_map_of_it(data, tmp_path):
    area = gk.area_of_applicability(Net(), data)
    image = data.dataset("test")[0]["image"]
    scene = tmp_path / "scene.tif"
    with rasterio.open(
        scene, "w", driver="GTiff", count=6, height=32, width=32, dtype="float32",
        crs="EPSG:32633", transform=rasterio.transform.from_origin(5e5, 5e6, 10, 10),
    ) as raster:  # fmt: skip
        raster.descriptions = BANDS
        raster.write(image.numpy())
    gk.predict_scene(area, scene, tmp_path / "out.tif", window=32, progress=False)
    with rasterio.open(tmp_path / "out.tif") as raster:
        written = raster.read(1)
    assert written == pytest.approx(area(image[None])[0, 0].numpy(), rel=1e-4)


def test_what_cannot_be_measured_is_said(data):
    with pytest.raises(ValueError, match="one region and one block"):
        gk.area_of_applicability(Net(), data.subset(1))
    with pytest.raises(ValueError, match="samples is 1"):
        gk.area_of_applicability(Net(), data, samples=1)
    with pytest.raises(ValueError, match="same features"):
        AreaOfApplicability(Pixels(), torch.ones(9, 6), torch.arange(9))
    change = Net()
    change.task = "change"
    with pytest.raises(ValueError, match="two dates"):
        gk.area_of_applicability(change, data)
