"""A model on disk: round trips of every task, method and decoder, and what is refused.

Round trips are bit for bit: the loaded model's answer is the saved one's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import method_table
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from torch import Tensor, nn
from toy import toy_data

import geopeft_kit as gk
from geopeft_kit import files
from geopeft_kit.decoders import DECODERS
from geopeft_kit.model import Model

TINY = "geopeft_tiny"


def built(
    decoder: str = "linear",
    task: str = "segmentation",
    method: str | None = "lora",
    name: str = TINY,
    load: dict[str, Any] | None = None,
    **options: Any,
) -> Model:
    """A model whose every trained number has left its start."""
    torch.manual_seed(0)
    backbone = gk.load_backbone(name, **(load or {}))
    if method is not None:
        method_table.stir(gk.attach(backbone, method))
    return stirred(gk.build_model(backbone, decoder, task, 3, **options))


def stirred(model: Model) -> Model:
    """The decoder away from its start, its standardisation too."""
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    model.calibrate(model.features(pixels(model)))
    return model


def pixels(model: Model) -> Tensor:
    side = 2 * max(model.backbone.strides)
    shape = [2, len(model.bands), side, side]
    if model.task == "change":
        shape.insert(2, 2)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(pixels(model))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# --- round trips --------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [*DECODERS])
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("segmentation", {}),
        ("regression", {}),
        ("change", {"fusion": "difference"}),
        ("change", {"fusion": "concatenate"}),
        ("super_resolution", {"factor": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_every_decoder_and_task(decoder, task, options, tmp_path: Path):
    width = {} if decoder == "linear" else {"width": 32}
    model = built(decoder, task, **options, **width)
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.config == model.config and loaded.is_calibrated
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_every_task_of_whole_images(task: str, tmp_path: Path):
    model = built(task=task)
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    assert torch.equal(answer(loaded), answer(model))


def rows() -> list[Any]:
    """Every method on every kind of backbone; all but the first kind are slow."""
    return [
        pytest.param(
            row, kind, id=f"{row}-{kind}", marks=[pytest.mark.slow] if number else []
        )
        for row in method_table.ROWS
        for number, kind in enumerate(row.serves)
    ]


@pytest.mark.parametrize(("row", "kind"), rows())
def test_every_method(row, kind: str, tmp_path: Path):
    """Also the backbone's own weights, which the table has stirred, are saved."""
    backbone = method_table.make(kind, row.load)
    adapter = gk.attach(backbone, row.name, **row.options)
    method_table.stir(adapter)
    model = stirred(gk.build_model(backbone, "linear", num_classes=3))
    if kind == "resnet":
        model.train()(pixels(model))  # statistics of batch norms move, where they may
        model.eval()
    folder = gk.save_model(model, tmp_path / "model")
    again = None if backbone.origin else method_table.make(kind, row.load)
    loaded = gk.load_model(folder, again)
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.backbone.adapter.name == row.name
    assert backbone.adapter is adapter  # as it was
    assert (folder / "backbone.safetensors").exists() == (backbone.origin is not None)


@pytest.mark.parametrize("method", ["lora", "full", "bias", "norm", "last_blocks"])
def test_frozen_weights_are_not_saved(method: str, tmp_path: Path):
    model = built(method=method)
    folder = gk.save_model(model, tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.json", "model.safetensors",
                     "adapter.json", "adapter.safetensors"}  # fmt: skip
    decoder = sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    assert size(folder) < model.backbone.adapter.num_bytes + decoder + 30_000


def test_without_a_method_nothing_but_trained_weights_is_saved(tmp_path: Path):
    model = built(method=None)
    first = gk.save_model(model, tmp_path / "untrained")
    assert not (first / "backbone.safetensors").exists()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.01)
    folder = gk.save_model(model, tmp_path / "trained")
    assert (folder / "backbone.safetensors").exists()
    loaded = gk.load_model(folder)
    assert torch.equal(answer(loaded), answer(model))
    assert not torch.equal(answer(gk.load_model(first)), answer(model))


def test_a_merged_adapter_is_saved_as_weights(tmp_path: Path):
    model = built()
    model.backbone.adapter.merge()
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    assert loaded.backbone.adapter is None
    assert torch.equal(answer(loaded), answer(model))
    gk.save_model(loaded, tmp_path / "model")  # over the only copy of its weights
    assert torch.equal(answer(gk.load_model(tmp_path / "model")), answer(model))


LOADS: list[dict[str, Any]] = [
    {"name": "geopeft_tiny_rgb", "load": {"bands": "hls", "new_bands": "random"}},
    {"name": "geopeft_tiny_rgb", "load": {"bands": "hls", "new_bands": "ignore"}},
    {"load": {"bands": ["SWIR_1", "RED", "NIR_NARROW"], "image_size": 64}},
    {"load": {"normalise": False}},
    {"load": {"weights": None}},
    {"name": "galileo_nano", "load": {"weights": None, "patch": 4}},
    {"name": "timm:resnet10t", "load": {"weights": None}},
]


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_the_backbone_is_loaded_as_it_was(case: dict[str, Any], tmp_path: Path):
    """Also weights that were drawn at random: they are drawn again."""
    model = built(**case)
    state = torch.random.get_rng_state()
    folder = gk.save_model(model, tmp_path / "model")
    loaded = gk.load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not (folder / "backbone.safetensors").exists()
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.bands == model.bands
    assert loaded.backbone.image_size == model.backbone.image_size


def test_several_dates(tmp_path: Path):
    torch.manual_seed(0)
    backbone = gk.load_backbone("prithvi_eo_v2_tiny_tl", weights=None, dates=3)
    gk.attach(backbone, "lora")
    model = gk.build_model(backbone, "linear").eval()
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    image = torch.rand(1, 6, 3, 32, 32)
    meta = {"date": torch.tensor([[[2020.0, day] for day in (9.0, 99.0, 199.0)]]),
            "lonlat": torch.tensor([[8.0, 50.0]])}  # fmt: skip
    with torch.no_grad():
        assert torch.equal(loaded(image, meta), model(image, meta))


def test_half_precision_comes_back_in_half(tmp_path: Path):
    model = built()
    model.backbone.bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*call model.float"):
        gk.save_model(model, tmp_path / "model")
    model.bfloat16()
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    image = pixels(model).bfloat16()
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


def test_a_backbone_in_memory_serves_again(tmp_path: Path):
    model = built()
    folder = gk.save_model(model, tmp_path / "model")
    backbone = gk.load_backbone(TINY)
    own = [p.data_ptr() for p in backbone.parameters()]
    loaded = gk.load_model(folder, backbone=backbone)
    assert loaded.backbone is backbone
    assert set(own) <= {p.data_ptr() for p in backbone.parameters()} | set(own)
    assert torch.equal(answer(loaded), answer(model))
    second = gk.load_model(folder, backbone=backbone)  # beside the first, swapped in
    assert torch.equal(answer(second), answer(model))


def test_training_goes_on_after_loading(tmp_path: Path):
    loaded = gk.load_model(gk.save_model(built(), tmp_path / "model"))
    loaded(pixels(loaded)).square().mean().backward()
    assert all(p.grad is not None for p in loaded.trainable_parameters())


ELSEWHERE = """
import sys, torch
import geopeft_kit as gk
folder, image, result = sys.argv[1:]
model = gk.load_model(folder)
with torch.no_grad():
    torch.save(model(torch.load(image, weights_only=True)), result)
"""


@pytest.mark.slow
@pytest.mark.parametrize("load", [{}, {"weights": None}], ids=str)
def test_another_process_computes_the_same(load: dict[str, Any], tmp_path: Path):
    model = built("unet", load=load, width=32)
    folder = gk.save_model(model, tmp_path / "model")
    torch.save(pixels(model), tmp_path / "image.pt")
    paths = [folder, tmp_path / "image.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, paths)], check=True)
    assert torch.equal(torch.load(paths[-1], weights_only=True), answer(model))


@pytest.mark.gpu
def test_from_a_gpu_to_a_cpu(tmp_path: Path):
    model = built("unet", width=32)
    expected = answer(model)
    loaded = gk.load_model(gk.save_model(model.cuda(), tmp_path / "model"))
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(answer(loaded), expected)


def test_lora_and_unet_on_prithvi_100m_are_a_tenth_of_a_checkpoint():
    """Counted on the meta device; files are as large as their tensors, see above."""
    with torch.device("meta"):
        backbone = gk.load_backbone("prithvi_eo_v1_100", weights=None)
        adapter = gk.attach(backbone, "lora", rank=8)
        model = gk.build_model(backbone, "unet")
    stock = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    decoder = model.decoder.state_dict().values()
    ours = adapter.num_bytes + sum(t.numel() * t.element_size() for t in decoder)
    assert ours + 40_000 <= 0.1 * stock


# --- what it learnt from the data ---------------------------------------------------


def test_fit_leaves_names_and_colours(tmp_path: Path):
    data = toy_data(tmp_path / "data", chips=12)
    data.colours = ["#000000", "#00ff00"]
    backbone = gk.load_backbone(TINY, bands=data.bands)
    gk.attach(backbone, "lora", rank=2)
    model = gk.build_model(backbone, "linear", data.task, data.num_classes)
    assert model.classes is None
    gk.fit(model, data, epochs=1, progress=False)
    loaded = gk.load_model(gk.save_model(model, tmp_path / "model"))
    assert loaded.classes == ["low", "high"]
    assert loaded.colours == data.colours
    assert loaded.bands == list(data.bands)
    assert gk.evaluate(loaded, data) == gk.evaluate(model, data)


def warp_box(path: Path) -> tuple[float, ...]:
    """West, south, east, north of a raster in degrees."""
    with rasterio.open(path) as raster:
        return transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)


def write_scene(path: Path, model: Model, side: int = 96) -> Path:
    """A scene of reflectance in the model's bands, somewhere in Europe."""
    image = torch.rand(len(model.bands), side, side).numpy()
    grid = from_origin(500_000, 5_100_000, 10, 10)
    with rasterio.open(path, "w", driver="GTiff", count=len(image), height=side,
                       width=side, dtype="float32", crs="EPSG:32633",
                       transform=grid) as raster:  # fmt: skip
        raster.write(image)
        raster.descriptions = model.bands
    return path


def test_scene_place_and_map_take_names_and_colours_from_the_model(tmp_path: Path):
    model = built()
    model.classes, model.colours = ["a", "b", "c"], ["#010203", "#aabbcc", "#ffffff"]
    model = gk.load_model(gk.save_model(model, tmp_path / "model"))
    scene = write_scene(tmp_path / "scene.tif", model)
    out = gk.predict_scene(model, scene, tmp_path / "out.tif", scale=1.0)
    with rasterio.open(out) as raster:
        assert json.loads(raster.tags()["classes"]) == model.classes
        assert raster.colormap(1)[1][:3] == (0xAA, 0xBB, 0xCC)
    shown = gk.show_map([gk.MapLayer("prediction", out, "classes")])
    legend = shown.drawing.layers[0].legend.entries
    assert legend == (("#010203", "a"), ("#aabbcc", "b"), ("#ffffff", "c"))
    west, south, east, north = warp_box(scene)
    box = (west + 0.001, south + 0.001, east - 0.001, north - 0.001)
    layers = gk.predict_place(box, model, scene, tmp_path, scale=1.0)
    assert layers[1].classes == model.classes
    own = ["x", "y", "z"]  # said aloud, it wins
    gk.predict_scene(model, scene, out, scale=1.0, classes=own)
    with rasterio.open(out) as raster:
        assert json.loads(raster.tags()["classes"]) == own


def test_a_place_without_names_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no class names.*Pass classes="):
        gk.predict_place((8, 50, 9, 51), built(), "scene.tif", tmp_path)


# --- what is refused ----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return gk.save_model(built(), tmp_path / "model")


def test_only_models_are_saved(tmp_path: Path):
    with pytest.raises(TypeError, match=r"build_model, but a Linear"):
        gk.save_model(nn.Linear(1, 1), tmp_path / "model")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_a_model_that_lost_its_adapter_is_refused(tmp_path: Path):
    data = toy_data(tmp_path / "data", chips=12)
    backbone = gk.load_backbone(TINY, bands=data.bands)
    adapter = gk.attach(backbone, "lora", rank=2)
    model = gk.build_model(backbone, "linear", data.task, data.num_classes)
    gk.fit(model, data, epochs=1, progress=False)
    gk.save_model(model, tmp_path / "model")
    other = gk.attach(backbone, "bias")
    with pytest.raises(ValueError, match=r"'lora' adapter, which is not active"):
        gk.save_model(model, tmp_path / "other")
    assert backbone.adapter is other
    other.detach()
    adapter.detach()
    with pytest.raises(ValueError, match=r"before adapter.detach"):
        gk.save_model(model, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors",
                                  "adapter.json", "adapter.safetensors"])  # fmt: skip
def test_missing_and_damaged_files(saved: Path, name: str):
    path = saved / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is (damaged|truncated)"):
        gk.load_model(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        gk.load_model(saved)


def test_a_newer_format(saved: Path):
    path = saved / "model.json"
    newer = json.loads(path.read_text()) | {"format": 2, "geopeft_kit": "9.0"}
    path.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"format 2, of geopeft_kit 9.0.*Update"):
        gk.load_model(saved)


@pytest.mark.parametrize("method", ["lora", None])
def test_another_backbone(method: str | None, tmp_path: Path):
    folder = gk.save_model(built(method=method), tmp_path / "model")
    for other, said in (
        (gk.load_backbone("galileo_nano", weights=None), r"name='geopeft_tiny'"),
        (gk.load_backbone(TINY, bands=["RED"]), r"bands=\['BLUE', "),
        (gk.load_backbone(TINY, normalise=False), "normalise=True"),
        (gk.load_backbone(TINY, weights=None), "other weights"),
    ):
        with pytest.raises(ValueError, match=said):
            gk.load_model(folder, backbone=other)
        assert other.adapter is None


def test_weights_that_are_gone(tmp_path: Path):
    place = tmp_path / "downloads" / "weights.safetensors"
    place.parent.mkdir()
    own = Path(gk.__file__).parent / "weights"
    shutil.copy(own / gk.load_backbone(TINY).card.weights["default"].file, place)
    model = built(load={"weights": place})
    folder = gk.save_model(model, tmp_path / "model")
    assert torch.equal(answer(gk.load_model(folder)), answer(model))
    moved = place.rename(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"weights.safetensors, which is gone"):
        gk.load_model(folder)
    loaded = gk.load_model(folder, backbone=gk.load_backbone(TINY, weights=moved))
    assert torch.equal(answer(loaded), answer(model))


def test_an_error_leaves_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    replace = os.replace

    def full_disk(source: Any, target: Any) -> None:
        if Path(target) == saved and not str(source).endswith(".old"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        gk.save_model(built("unet"), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_saving_again_replaces_all_of_it(saved: Path):
    model = built("fcn", method=None)
    gk.save_model(model, saved)
    assert torch.equal(answer(gk.load_model(saved)), answer(model))
    assert not (saved / "adapter.json").exists()


def test_other_files_are_not_lost(saved: Path):
    with pytest.raises(FileExistsError, match=r"model.json is a file"):
        gk.save_model(built(), saved / "model.json")
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes.txt.*Choose another"):
        gk.save_model(built(), saved)
    assert (saved / "notes.txt").read_text() == "mine"


def test_files_have_the_rights_of_ordinary_files(tmp_path):
    model = gk.build_model(gk.load_backbone("geopeft_tiny"), "linear")
    (tmp_path / "plain").write_text("")
    rights = (tmp_path / "plain").stat().st_mode
    folder = gk.save_model(model, tmp_path / "model")
    assert {path.stat().st_mode for path in folder.iterdir()} == {rights}
