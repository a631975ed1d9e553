"""torchgeo's own data sets and data modules go into `fit` as they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import upstreams
from torch import Tensor
from torch.utils.data import Dataset, Subset

import geopeft_kit as gk


def model_for(task: str, classes: int, bands: str = "rgb") -> Any:
    torch.manual_seed(0)
    backbone = gk.load_backbone(
        "geopeft_tiny", bands=bands, weights=None, image_size=32, new_bands="random"
    )
    gk.attach(backbone, "lora", rank=2)
    decoder = "linear" if task != "change" else "unet"
    return gk.build_model(backbone, decoder=decoder, task=task, num_classes=classes)


def fitted(model: Any, data: Any) -> Any:
    return gk.fit(model, data, epochs=1, head_start="none", progress=False)


def small(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """What users do with transforms: a size, and reflectance."""
    resized = torch.nn.functional.interpolate(sample["image"][None] / 255, (32, 32))[0]
    return sample | {"image": resized}


@pytest.mark.slow
def test_a_data_set_trains(tmp_path: Path) -> None:
    from torchgeo.datasets import UCMerced

    upstreams.uc_merced(tmp_path)
    names = [f"{label}{i:02d}.tif" for label in upstreams.UCM for i in range(2)]
    upstreams.lines(tmp_path / "uc_merced-train.txt", names)
    data = Subset(UCMerced(tmp_path, "train", transforms=small), range(9))
    run = fitted(model_for("classification", 21), data)
    assert run.history["loss"].notna().all()
    assert run.metrics == {}, "there is no validation split"
    assert 0 <= gk.evaluate(run.model, data, "train")["overall"]["accuracy"] <= 1
    with pytest.raises(ValueError, match="no split 'test'.*it has train"):
        gk.evaluate(run.model, data)


@pytest.mark.slow
def test_a_data_module_trains(tmp_path: Path) -> None:
    from torchgeo.datamodules import LoveDADataModule

    upstreams.loveda(tmp_path)
    for path in (tmp_path / "Val").rglob("*.png"):  # upstream's third part
        upstreams.picture(tmp_path / "Test" / path.relative_to(tmp_path / "Val"), 32)
    module = LoveDADataModule(batch_size=2, root=str(tmp_path))
    model = model_for("segmentation", 8)
    with pytest.warns(UserWarning, match=r"reach 25\d.*scale=1/255"):
        run = fitted(model, module)
    assert set(run.metrics["overall"]) >= {"miou"}, "it validates on the module's own"
    data = gk.TorchgeoData(module, "segmentation", 8, scale=1 / 255, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batch = next(iter(data.dataloader("val")))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].max() <= 1
    assert batch["mask"].dtype == torch.int64


@pytest.mark.slow
def test_change_pairs_train(tmp_path: Path) -> None:
    from torchgeo.datasets import OSCD

    upstreams.oscd(tmp_path)
    sets = {"train": OSCD(tmp_path, "train"), "test": OSCD(tmp_path, "test")}
    data = gk.TorchgeoData(sets, "change", 2, scale=1e-4, batch_size=2)
    batch = next(iter(data.dataloader("train")))
    first = sets["train"][0]["image"]  # (2, C, H, W)
    assert torch.equal(batch["image"][0, :, 1], first[1] * 1e-4)
    assert batch["mask"].shape == (2, 40, 40)
    crop = {key: batch[key][..., :32, :32] for key in ("image", "mask")}
    again = _List([{"image": i.transpose(0, 1), "mask": m} for i, m in zip(
        crop["image"], crop["mask"], strict=True)])  # fmt: skip
    run = fitted(
        model_for("change", 2, "sentinel2_l1c"), {"train": again, "val": again}
    )
    assert 0 <= run.metrics["overall"]["miou"] <= 1


@pytest.mark.slow
def test_a_geo_data_module_gives_the_patches_of_its_sampler(tmp_path: Path) -> None:
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler

    from geopeft_kit.data.torchgeo_data import GeoPatches

    upstreams.geotiff(tmp_path / "scene.tif", upstreams.stored("scene", 3, 64))
    scene = RasterDataset(tmp_path)
    patches = GeoPatches(scene, GridGeoSampler(scene, size=32, stride=32))
    assert len(patches) == 4
    assert patches[0]["image"].shape == (3, 32, 32)


class _List(Dataset):
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def samples(count: int = 12, **changes: Any) -> _List:
    rows = [
        {"image": torch.full((3, 8, 8), i / 20), "label": i % 3} for i in range(count)
    ]
    return _List([row | changes for row in rows])


def test_order_and_subsets_are_those_of_chip_data() -> None:
    data = gk.TorchgeoData(samples(), "classification", 3, batch_size=4)
    loaders = [data.dataloader("train", shuffle=True, seed=s) for s in (1, 1, 2)]
    seen = [torch.cat([b["image"][:, 0, 0, 0] for b in x]).tolist() for x in loaders]
    assert seen[0] == seen[1] != seen[2]
    few, more = (set(data.subset(n).dataset("train").indices) for n in (3, 7))
    assert few < more
    assert len(data.dataset("train")) == 12


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="needs 'mask'"):
        next(iter(gk.TorchgeoData(samples(), "segmentation", 2).dataloader("train")))
    with pytest.raises(ValueError, match="task is .*allowed are segmentation"):
        gk.TorchgeoData(samples(), "detection", 2)
    with pytest.raises(ValueError, match="needs num_classes"):
        gk.TorchgeoData(samples(), "classification")
    with pytest.raises(ValueError, match="'train' has to be there"):
        gk.TorchgeoData({"test": samples()}, "classification", 3)
    mixed = _List([*samples(3).samples, {"image": torch.zeros(3, 9, 8), "label": 0}])
    with pytest.raises(ValueError, match="cannot share a batch.*resizes"):
        next(iter(gk.TorchgeoData(mixed, "classification", 3).dataloader("train")))


@pytest.mark.slow
def test_a_batch_size_is_found_for_torchgeos_data_too() -> None:
    backbone = gk.load_backbone("geopeft_tiny_rgb", weights=None)
    gk.attach(backbone, "frozen")
    model = gk.build_model(backbone, "linear", "classification", 3)
    run = gk.fit(model, samples(), epochs=1, batch_size="auto", progress=False)
    assert run.settings["batch_size"] == 12


def test_a_geodataset_comes_with_its_sampler(tmp_path: Path) -> None:
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler

    for name, pixels in (
        ("image", np.full((3, 64, 64), 0.2, "f4")),
        ("mask", np.eye(64, dtype="u1")[None]),
    ):
        (tmp_path / name).mkdir()
        place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)}
        with rasterio.open(
            tmp_path / name / "a.tif", "w", driver="GTiff", count=len(pixels),
            width=64, height=64, dtype=pixels.dtype, **place,
        ) as file:  # fmt: skip
            file.write(pixels)

    class Masks(RasterDataset):
        is_image = False

    both = RasterDataset(tmp_path / "image") & Masks(tmp_path / "mask")
    with pytest.raises(ValueError, match=r"sampler.*RandomGeoSampler"):
        gk.TorchgeoData(both, "segmentation", 2)
    loader = DataLoader(both, 2, sampler=GridGeoSampler(both, size=32, stride=32))
    data = gk.TorchgeoData({"train": loader}, "segmentation", 2, batch_size=2)
    seen = [batch["mask"] for batch in data.dataloader("train")]
    assert seen[0].shape == (2, 32, 32)
    assert int(torch.cat(seen).sum()) == 64, "each pixel once"
