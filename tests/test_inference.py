"""Whole scenes: what is stitched equals what is predicted in one piece."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from torch import nn

from geopeft_kit.scenes.blending import blend_weight, window_starts
from geopeft_kit.scenes.inference import predict_scene

BANDS = ("BLUE", "GREEN", "RED")
TRANSFORM = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 4_100_000.0)


class Backbone(nn.Module):
    bands = BANDS
    strides = [4, 4, 4, 4]


class Net(nn.Module):
    """Three bands to K channels, with a backbone that only states its bands."""

    def __init__(self, layer: nn.Module, task: str = "segmentation") -> None:
        super().__init__()
        self.backbone, self.layer, self.task = Backbone(), layer, task

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.isfinite().all()
        return self.layer(image)


def write_scene(path, image, descriptions=BANDS, nodata=None, scale=None, **profile):
    profile = {"crs": "EPSG:32630", "transform": TRANSFORM} | profile
    count, height, width = image.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width,
        dtype=image.dtype, nodata=nodata, **profile,
    ) as raster:  # fmt: skip
        if descriptions:
            raster.descriptions = descriptions
        if scale:
            raster.scales = [scale] * count
        raster.write(image)
    return path


def reflectance(height: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.uniform(0, 1, (3, height, width)).astype(np.float32)


def pixelwise(task: str = "segmentation", channels: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, channels, 1), task).eval()


def whole(model: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(image)[None])[0].numpy()


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as raster:
        return raster.read()


# --- windows --------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window", "step"), [
    (1, 8, 4), (8, 8, 8), (9, 8, 8), (100, 8, 4), (101, 32, 7), (33, 32, 1),
])  # fmt: skip
def test_windows_cover_every_pixel_and_stay_inside(length, window, step):
    starts = window_starts(length, window, step)
    seen = np.zeros(max(length, window), int)
    for start in starts:
        seen[start : start + window] += 1
    assert (seen[:length] >= 1).all()
    assert starts == sorted(set(starts))
    assert length <= window or starts[-1] + window == length


def test_side_by_side_windows_cover_every_pixel_once():
    seen = np.zeros(96, int)
    for start in window_starts(96, 32, 32):
        seen[start : start + 32] += 1
    assert (seen == 1).all()


def test_weight_is_smooth_symmetric_and_nowhere_zero():
    weight = blend_weight(64)
    assert weight.min() > 0
    assert np.allclose(weight, weight[::-1]) and np.allclose(weight, weight.T)
    assert weight[31, 31] == weight.max()
    # at half overlap, the weights of neighbours sum to the same everywhere
    bump = np.sqrt(weight.diagonal())
    assert np.allclose(bump[:32] + bump[32:], 1, atol=1e-6)


# --- stitched equals whole ------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (71, 93), (20, 200), (5, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_pixelwise_model_stitched_equals_whole(tmp_path, size, overlap):
    image = reflectance(*size)
    source = write_scene(tmp_path / "scene.tif", image)
    model = pixelwise()
    predict_scene(
        model, source, tmp_path / "out.tif", window=32, overlap=overlap,
        batch_size=3, progress=False, probabilities=True,
    )  # fmt: skip
    logits = whole(model, image)
    assert (read(tmp_path / "out.tif")[0] == logits.argmax(0)).all()
    expected = np.exp(logits) / np.exp(logits).sum(0)
    probabilities = read(tmp_path / "out_probabilities.tif")
    assert np.allclose(probabilities, expected, atol=1e-5)


def test_convolution_stitched_equals_whole_where_windows_see_enough(tmp_path):
    """Side by side but for the margin: weights at the rim are all but nothing."""
    image = reflectance(80, 112)
    source = write_scene(tmp_path / "scene.tif", image)
    torch.manual_seed(1)
    model = Net(nn.Conv2d(3, 1, 3, padding=1), "regression").eval()
    predict_scene(
        model, source, tmp_path / "out.tif", window=32, overlap=0.5, progress=False
    )
    difference = np.abs(read(tmp_path / "out.tif")[0] - whole(model, image)[0])
    # A window is wrong only in its outermost pixels, whose weight is below 0.3 %.
    assert difference.max() < 5e-3
    naive = tmp_path / "naive.tif"
    predict_scene(model, source, naive, window=32, overlap=0, progress=False)
    assert np.abs(read(naive)[0] - whole(model, image)[0]).max() > 0.05


def finer(factor: int, channels: int = 3) -> Net:
    """Every pixel becomes factor x factor pixels of its own."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels * factor**2, 1), nn.PixelShuffle(factor)
    net = Net(nn.Sequential(*layers), "super_resolution").eval()
    net.factor = factor
    return net


@pytest.mark.parametrize(("factor", "size", "overlap"), [
    (2, (71, 93), 0.5), (3, (20, 90), 0.0), (4, (5, 7), 0.8), (2, (300, 33), 0.25),
])  # fmt: skip
def test_the_finer_grid_stitched_equals_whole(tmp_path, factor, size, overlap):
    image = reflectance(*size)
    image[1, :3, :2] = -9999
    source = write_scene(tmp_path / "scene.tif", image, nodata=-9999)
    target = predict_scene(
        finer(factor), source, tmp_path / "out.tif", window=32, overlap=overlap,
        batch_size=3, progress=False,
    )  # fmt: skip
    with rasterio.open(target) as raster:
        assert raster.shape == (size[0] * factor, size[1] * factor)
        assert raster.descriptions == BANDS and raster.crs.to_epsg() == 32630
        assert raster.transform.a == 10 / factor
        west, south, east, north = raster.bounds
        assert (west, north) == (TRANSFORM.c, TRANSFORM.f)
        assert east - west == pytest.approx(size[1] * 10)
        assert north - south == pytest.approx(size[0] * 10)
        values = raster.read()
    expected = whole(finer(factor), image)
    expected[:, : 3 * factor, : 2 * factor] = np.nan
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_bands_of_another_number_have_no_names_and_no_classes(tmp_path):
    source = write_scene(tmp_path / "scene.tif", reflectance(40, 40))
    options = {"window": 32, "progress": False}
    two = predict_scene(finer(2, 2), source, tmp_path / "out.tif", **options)
    with rasterio.open(two) as raster:
        assert raster.descriptions == ("band 1", "band 2")
    for wrong, text in (
        ({"probabilities": True}, "needs task 'segmentation'"),
        ({"classes": ["a", "b"]}, "not apply to the task 'super_resolution'"),
    ):
        with pytest.raises(ValueError, match=text):
            predict_scene(finer(2), source, two, **options, **wrong)
    lazy = finer(2)
    lazy.factor = 4  # it says 4 and makes 2
    with pytest.raises(ValueError, match="images of .32, 32. pixels; expected .*128"):
        predict_scene(lazy, source, two, **options)


def test_sixteen_bits_give_nearly_the_same(tmp_path):
    image = reflectance(40, 52)
    source = write_scene(tmp_path / "scene.tif", image)
    model = pixelwise("regression", channels=1)
    options = {"window": 16, "progress": False, "resume": True}
    plain = read(predict_scene(model, source, tmp_path / "a.tif", **options))
    low = {"precision": "bf16-mixed", **options}
    rough = read(predict_scene(model, source, tmp_path / "b.tif", **low))
    assert 0 < np.abs(plain - rough).max() < 0.02
    with pytest.raises(ValueError, match="allowed are auto, 32-true"):
        predict_scene(model, source, tmp_path / "c.tif", precision="bf16")


def test_more_rows_than_one_block(tmp_path):
    image = reflectance(600, 40)
    source = write_scene(tmp_path / "scene.tif", image)
    predict_scene(pixelwise(), source, tmp_path / "out.tif", window=64, progress=False)
    expected = whole(pixelwise(), image).argmax(0)
    assert (read(tmp_path / "out.tif")[0] == expected).all()


# --- what is kept ---------------------------------------------------------------------


def test_transform_crs_nodata_names_and_colours_are_kept(tmp_path):
    image = reflectance(50, 70)
    image[:, 10:20, 30:40] = -9999
    image[1, 0, 0] = np.nan  # one band is enough
    source = write_scene(tmp_path / "scene.tif", image, nodata=-9999)
    target = predict_scene(
        pixelwise(), source, tmp_path / "out.tif", window=32, progress=False,
        classes=["land", "water", "cloud"],
        colours={"land": "#112233", "water": (0, 0, 255), "cloud": "#ffffff"},
    )  # fmt: skip
    with rasterio.open(target) as raster:
        assert raster.transform == TRANSFORM
        assert raster.crs.to_epsg() == 32630
        assert raster.dtypes == ("uint8",) and raster.nodata == 255
        assert raster.colormap(1)[1][:3] == (0, 0, 255)
        assert "water" in raster.tags()["classes"]
        classes = raster.read(1)
    empty = np.zeros((50, 70), bool)
    empty[10:20, 30:40] = empty[0, 0] = True
    assert (classes[empty] == 255).all()
    assert set(np.unique(classes[~empty])) <= {0, 1, 2}


def test_regression_writes_floats_and_nan_where_there_is_no_data(tmp_path):
    image = reflectance(40, 40)
    image[:, :5] = 0
    source = write_scene(tmp_path / "scene.tif", image, nodata=0)
    model = pixelwise("regression", 1)
    predict_scene(model, source, tmp_path / "out.tif", window=32, progress=False)
    values = read(tmp_path / "out.tif")[0]
    assert values.dtype == np.float32
    assert np.isnan(values[:5]).all()
    assert np.allclose(values[5:], whole(model, image)[0, 5:], atol=1e-5)


def test_a_scene_without_any_data_is_all_nodata(tmp_path):
    image = np.zeros((3, 40, 40), np.float32)
    source = write_scene(tmp_path / "scene.tif", image, nodata=0)
    predict_scene(pixelwise(), source, tmp_path / "out.tif", window=32, progress=False)
    assert (read(tmp_path / "out.tif") == 255).all()


def test_bands_are_picked_by_name_not_by_place(tmp_path):
    image = reflectance(40, 40)
    mixed = np.stack([image[2], np.full_like(image[0], 9), image[0], image[1]])
    described = ("B04", "cloud mask", "B02", "Green")
    source = write_scene(tmp_path / "scene.tif", mixed, described)
    nameless = write_scene(tmp_path / "nameless.tif", mixed, None)
    expected = whole(pixelwise(), image).argmax(0)
    for path, bands in ((source, None), (nameless, described)):
        predict_scene(
            pixelwise(), path, tmp_path / "out.tif", window=32, bands=bands,
            progress=False,
        )  # fmt: skip
        assert (read(tmp_path / "out.tif")[0] == expected).all()


def test_integers_are_scaled_as_stated(tmp_path):
    image = reflectance(40, 40)
    stored = np.round(image * 10000).astype(np.uint16)
    silent = write_scene(tmp_path / "silent.tif", stored)
    stated = write_scene(tmp_path / "stated.tif", stored, scale=1e-4)
    model = pixelwise("regression", 1)
    with pytest.raises(ValueError, match="Pass scale="):
        predict_scene(model, silent, tmp_path / "out.tif", window=32, progress=False)
    for path, scale in ((silent, 1e-4), (stated, None)):
        predict_scene(
            model, path, tmp_path / "out.tif", window=32, scale=scale, progress=False
        )
        found = read(tmp_path / "out.tif")[0]
        assert np.allclose(found, whole(model, image)[0], atol=1e-3)


def test_model_is_left_in_the_mode_it_was_in(tmp_path):
    source = write_scene(tmp_path / "scene.tif", reflectance(40, 40))
    model = Net(nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 2, 1)))
    model.train()
    model.layer[0].eval()
    paths = [tmp_path / "a.tif", tmp_path / "b.tif"]
    for path in paths:
        predict_scene(model, source, path, window=32, progress=False)
    assert (read(paths[0]) == read(paths[1])).all()  # dropout was off
    assert model.training and not model.layer[0].training


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "text"), [
    ({"overlap": 1.0}, "overlap=1.0"),
    ({"overlap": -0.1}, "overlap=-0.1"),
    ({"window": 30}, "multiple of 4.*window=32"),
    ({"window": 0}, "window=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"bands": ["RED"]}, "names 1 bands.*has 3"),
    ({"bands": ["RED", "GREEN", "NIR_NARROW"]}, "model wants BLUE"),
    ({"classes": ["one", "two"]}, "2 names.*3 classes"),
    ({"colours": ["red", "#000000", "#ffffff"]}, "'red' is not a colour"),
    ({"offset": 0.1}, "needs scale"),
])  # fmt: skip
def test_bad_arguments_say_what_to_do(tmp_path, arguments, text):
    source = write_scene(tmp_path / "scene.tif", reflectance(40, 40))
    arguments = {"window": 32, "progress": False} | arguments
    with pytest.raises(ValueError, match=text):
        predict_scene(pixelwise(), source, tmp_path / "out.tif", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_bad_scenes_and_models_say_what_to_do(tmp_path):
    target = tmp_path / "out.tif"
    image = reflectance(40, 40)
    source = write_scene(tmp_path / "scene.tif", image)
    nameless = write_scene(tmp_path / "nameless.tif", image, None)
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\x00 this is no GeoTIFF")
    with pytest.raises(FileNotFoundError, match="nowhere.tif"):
        predict_scene(pixelwise(), tmp_path / "nowhere.tif", target)
    with pytest.raises(FileNotFoundError, match="no_folder"):
        predict_scene(pixelwise(), source, tmp_path / "no_folder" / "out.tif")
    with pytest.raises(ValueError, match="cannot be read as a raster"):
        predict_scene(pixelwise(), broken, target)
    with pytest.raises(ValueError, match="no descriptions"):
        predict_scene(pixelwise(), nameless, target)
    with pytest.raises(ValueError, match="classification"):
        predict_scene(pixelwise("classification"), source, target)
    with pytest.raises(ValueError, match="3 channels for the task 'regression'"):
        predict_scene(pixelwise("regression", 3), source, target)
    with pytest.raises(ValueError, match="expected"):
        predict_scene(Net(nn.Conv2d(3, 2, 3)), source, target)
    assert not target.exists()


def test_truncated_scene_leaves_no_prediction(tmp_path):
    source = write_scene(tmp_path / "scene.tif", reflectance(300, 300))
    source.write_bytes(source.read_bytes()[:400_000])
    with pytest.raises(RuntimeError, match="cannot be read.*truncated"):
        predict_scene(pixelwise(), source, tmp_path / "out.tif", window=32)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def run_alone(script: str, **values) -> subprocess.CompletedProcess[str]:
    """Run a script that imports from this folder in an empty process."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    code += script.format(**values)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


FULL_DISK = """
import resource, signal
from test_inference import pixelwise, predict_scene
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    predict_scene(pixelwise(), {source!r}, {target!r}, window=64, progress=False)
except RuntimeError as error:
    print("RuntimeError", error)
"""


@pytest.mark.slow
def test_full_disk_leaves_the_old_prediction_and_nothing_else(tmp_path):
    source = write_scene(tmp_path / "scene.tif", reflectance(600, 600))
    target = tmp_path / "out.tif"
    target.write_text("the old one")
    done = run_alone(FULL_DISK, source=str(source), target=str(target))
    assert "RuntimeError" in done.stdout and "disk full" in done.stdout, done.stderr
    assert target.read_text() == "the old one"
    assert {path.name for path in tmp_path.iterdir()} == {"scene.tif", "out.tif"}


MEMORY = """
import resource
from test_inference import pixelwise, predict_scene
predict_scene(pixelwise(), {small!r}, {target!r}, window=128, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
predict_scene(pixelwise(), {big!r}, {target!r}, window=128, progress=False)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_floats_that_are_no_reflectance_are_refused(tmp_path):
    source = write_scene(tmp_path / "scene.tif", reflectance(40, 40) * 10000)
    with pytest.raises(ValueError, match="values up to .* scale=0.0001"):
        predict_scene(pixelwise(), source, tmp_path / "out.tif", window=32)
    predict_scene(pixelwise(), source, tmp_path / "out.tif", window=32, scale=1e-4)
    assert set(np.unique(read(tmp_path / "out.tif"))) <= {0, 1, 2}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_height_of_the_scene(tmp_path):
    paths = {}
    for name, height in (("small", 1024), ("big", 16 * 1024)):
        path = paths[name] = tmp_path / f"{name}.tif"
        profile = {"count": 3, "dtype": "uint16", "height": height, "width": 1024}
        with rasterio.open(path, "w", driver="GTiff", tiled=True, **profile) as raster:
            raster.descriptions = BANDS
            raster.scales = [1e-4] * 3
            for row in range(0, height, 1024):
                block = np.full((3, 1024, 1024), row % 9000, np.uint16)
                raster.write(block, window=((row, row + 1024), (0, 1024)))
    files = {name: str(path) for name, path in paths.items()}
    done = run_alone(MEMORY, target=str(tmp_path / "out.tif"), **files)
    before, after = map(int, done.stdout.split())
    # The scene alone is 96 MiB, its reflectance 192 MiB, its probabilities as much.
    assert after - before < 140 * 1024, f"{before} -> {after} KiB"
