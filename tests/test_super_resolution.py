"""Super-resolution: pairs from chips, the model's grid, both scores, the rival."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from rasterio.transform import from_origin
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

import geopeft_kit as gk
from geopeft_kit.training.step import compute_loss
from tests.toy import toy_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> gk.ChipData:
    return toy_data(tmp_path_factory.mktemp("toy")).for_super_resolution(2)


def model(data: gk.ChipData, decoder: str = "linear") -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = gk.load_backbone("geopeft_tiny", weights=None)
    gk.attach(backbone, "frozen")
    return gk.build_model(
        backbone, decoder, data.task, data.num_classes, factor=data.factor
    )


def test_images_are_means_of_their_targets(data: gk.ChipData) -> None:
    batch = next(iter(data.dataloader("train", shuffle=True, augment=True)))
    assert batch["image"].shape == (4, 6, 16, 16)
    assert batch["mask"].shape == (4, 6, 32, 32)
    torch.testing.assert_close(F.avg_pool2d(batch["mask"], 2), batch["image"])
    assert data.image_size == (16, 16) and data.num_classes == 6
    assert data.subset(3).dataset("train")[0]["mask"].shape == (6, 32, 32)


@pytest.mark.parametrize(("factor", "decoder"), [(2, "linear"), (4, "fcn")])
def test_the_answer_lies_on_the_finer_grid(data, factor: int, decoder: str) -> None:
    backbone = gk.load_backbone("geopeft_tiny", weights=None)
    net = gk.build_model(backbone, decoder, "super_resolution", 3, factor=factor)
    image = torch.rand(2, 6, 20, 12)
    assert net(image).shape == (2, 3, 20 * factor, 12 * factor)
    assert net.num_classes == 3 and net.config["factor"] == factor


def test_detail_is_added_to_the_enlarged_image(data: gk.ChipData) -> None:
    """A decoder that answers zero leaves cubic interpolation; other bands get none."""
    net, image = model(data).eval(), data.dataset("test")[0]["image"][None]
    for parameter in net.head.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        assert torch.equal(net(image), gk.baselines.Bicubic(data)(image))
    fewer = gk.build_model(net.backbone, "linear", data.task, 3)
    for parameter in fewer.head.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        assert fewer(image).abs().max() == 0


def test_scores_are_those_of_torchmetrics(data: gk.ChipData) -> None:
    rival = gk.baselines.Bicubic(data)
    found = gk.evaluate(rival, data, "test")["overall"]
    samples = [data.dataset("test")[i] for i in range(len(data.dataset("test")))]
    images, truth = (torch.stack([s[k] for s in samples]) for k in ("image", "mask"))
    guess = F.interpolate(images, scale_factor=2, mode="bicubic")
    psnr = peak_signal_noise_ratio(guess, truth, data_range=1.0)
    ssim = structural_similarity_index_measure(guess, truth, data_range=1.0)
    assert found["psnr"] == pytest.approx(float(psnr), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(ssim), rel=1e-4)
    table = gk.score_regions(rival, data, "test", resamples=20).set_index("region")
    assert table.loc["all regions", "psnr"] == pytest.approx(found["psnr"], rel=1e-5)
    assert table.loc["all regions", "ssim"] == pytest.approx(found["ssim"], rel=1e-4)


def test_a_perfect_answer_scores_one(data: gk.ChipData) -> None:
    from geopeft_kit.training.metrics import RegionalMetrics

    metrics = RegionalMetrics("super_resolution", 6, None)
    truth = data.dataset("test")[0]["mask"][None]
    metrics.update(truth, truth, ["far"])
    scores = metrics.compute()["overall"]
    assert scores["ssim"] == pytest.approx(1.0)
    assert scores["psnr"] == float("inf")


@pytest.mark.slow
def test_training_learns_and_the_memory_is_known(data: gk.ChipData) -> None:
    net = model(data)
    run = gk.fit(net, data, epochs=2, progress=False, head_start="calibrate")
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert set(run.metrics["overall"]) == {"psnr", "ssim"}
    assert gk.estimate_memory(net, batch_size=2).total_mib > 0


def test_a_scene_is_predicted_on_the_finer_grid(data: gk.ChipData, tmp_path) -> None:
    """Blended windows are the whole, up to the rim that each window cannot see past."""
    scene = tmp_path / "scene.tif"
    image = np.random.default_rng(0).uniform(0, 0.4, (6, 24, 40)).astype(np.float32)
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 30, 30)}
    with rasterio.open(
        scene, "w", driver="GTiff", count=6, height=24, width=40, dtype="float32",
        **place,
    ) as raster:  # fmt: skip
        raster.descriptions = data.bands
        raster.write(image)
    net, rival = model(data).eval(), gk.baselines.Bicubic(data)
    written = {}
    for name, found, window in (("net", net, 40), ("rival", rival, 16)):
        options = {"window": window, "progress": False, "resume": True}
        written[name] = gk.predict_scene(found, scene, tmp_path / f"{name}.tif",
                                         **options)  # fmt: skip
    with rasterio.open(written["net"]) as raster, torch.no_grad():
        assert raster.descriptions == data.bands and raster.transform.a == 15
        # the window is larger than the scene, which is mirrored beyond its end
        filled = np.pad(image, ((0, 0), (0, 16), (0, 0)), mode="symmetric")
        expected = net(torch.from_numpy(filled)[None])[0, :, :48].numpy()
        np.testing.assert_allclose(raster.read(), expected, atol=1e-6)
    with rasterio.open(written["rival"]) as raster:
        expected = rival(torch.from_numpy(image)[None])[0].numpy()
        assert np.abs(raster.read() - expected).max() < 5e-3
    layers = [gk.MapLayer(name, path) for name, path in written.items()]
    scene_map = gk.show_map([gk.MapLayer("image", scene), *layers])
    sizes = [picture_size(layer.pictures[0].url) for layer in scene_map.drawing.layers]
    assert min(sizes[0]) >= 48 and len(set(sizes)) == 1


def picture_size(url: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size


def test_pairs_of_two_sensors_come_as_samples() -> None:
    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"image": torch.rand(6, 16, 16), "mask": torch.rand(3, 32, 32)}

    data = gk.TorchgeoData({"train": Pairs()}, "super_resolution", 3, scale=0.5)
    batch = next(iter(data.dataloader("train")))
    assert batch["mask"].shape == (4, 3, 32, 32)
    assert float(batch["mask"].max()) <= 0.5


def test_refusals(data: gk.ChipData, tmp_path: Path) -> None:
    backbone = gk.load_backbone("geopeft_tiny", weights=None)
    with pytest.raises(ValueError, match="factor=3 does not fit task 'segmentation'"):
        gk.build_model(backbone, factor=3)
    for factor in (3, 1, 2.0):
        with pytest.raises(ValueError, match=f"factor is {factor}"):
            toy_data(tmp_path / "toy").for_super_resolution(factor)
    with pytest.raises(ValueError, match="factor=2.5 does not fit"):
        gk.build_model(backbone, task="super_resolution", factor=2.5)
    image = torch.rand(2, 6, 32, 32)
    for other in (image[:, :1], image[..., :16]):  # other bands, another factor
        with pytest.raises(ValueError, match=r"finer image is \(6, 32, 32\)"):
            compute_loss(other, image, "super_resolution")
    with pytest.raises(ValueError, match="for_super_resolution"):
        gk.baselines.Bicubic(toy_data(tmp_path / "toy"))
