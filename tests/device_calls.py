"""Each public name of the kit once, on the stand-in GPU, with images on the CPU.

Run as a script in a process of its own: the stand-in changes all of PyTorch. It prints
what fails and ends with 1 then. `test_devices.py` starts it.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from toy import BANDS, toy_data

import geopeft_kit as gk

GPU = torch.device("cuda")
FOLDER = Path(tempfile.mkdtemp())

# Public names that meet no tensor of a model, and why.
NOT_CALLED = {
    "Candidate": "a row of settings, read by compare",
    "ChipData": "chips on the CPU; every call below reads them",
    "MapLayer": "made by chip_layers",
    "MemoryEstimate": "made by estimate_memory",
    "TorchgeoData": "chips on the CPU, read as ChipData is",
    "check_data": "reads files",
    "export_model": "a copy on the CPU, traced there",
    "fetch_scene": "reads files and the network",
    "list_backbones": "a table of cards",
    "list_methods": "a table of cards",
    "mixed_precision": "a word for a device",
    "predict_place": "fetch_scene, then predict_scene",
    "sample_scene": "files",
    "simulated_data": "chips on the CPU",
    "touching_chips": "outlines of chips",
    "usable_mib": "a number for a card",
    "baselines.fit_logistic": "solves on the device of its tensors, as PyTorch does",
    "bands.Band": "a row of facts",
    "bands.band_indices": "names",
    "bands.resolve_bands": "names",
    "bands.wavelengths": "names",
    "plots.class_legend": "names and colours",
    "plots.method_colour": "a colour",
    "plots.method_marker": "a marker",
    "plots.plot_gap": "a table",
    "plots.plot_history": "a table",
    "plots.plot_resources": "numbers",
    "plots.plot_scores": "a table",
    "plots.plot_split": "outlines of chips",
}


@cache
def data(task: str = "segmentation") -> Any:
    return toy_data(FOLDER / task, task, chips=12)


def image() -> torch.Tensor:
    return torch.stack([sample()["image"]] * 2)


def sample() -> dict[str, Any]:
    return data().dataset("test")[0]


def on_gpu(chip: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(GPU) if torch.is_tensor(v) else v for k, v in chip.items()}


def backbone() -> Any:
    torch.manual_seed(0)
    return gk.load_backbone("geopeft_tiny", bands=BANDS, image_size=32)


@cache
def trained() -> Any:
    """A model as `fit` leaves it."""
    model = gk.build_model(backbone(), "linear")
    gk.attach(model.backbone, "lora", rank=2)
    gk.fit(model, data(), epochs=1, progress=False)
    assert next(model.parameters()).device == GPU, "fit did not train on the GPU"
    return model


def answers_everywhere(module: Any, given: Any, *more: Any) -> None:
    """A module on the GPU answers where its input is, and as it would on the CPU."""
    module.to(GPU).eval()
    with torch.no_grad():
        here, there = module(given, *more), module(given.to(GPU), *more)
        one, two = (x[-1] if isinstance(x, list) else x for x in (here, there))
        assert one.device.type == "cpu", f"{one.device} for an image on the CPU"
        assert two.device == GPU, f"{two.device} for an image on the GPU"
        known = module.cpu()(given, *more)
        module.to(GPU)
    known = known[-1] if isinstance(known, list) else known
    # Kernels may sum in another order: float32 holds six digits of the largest value.
    close = 1e-5 * max(1.0, float(known.abs().max()))
    torch.testing.assert_close(one, known, rtol=1e-4, atol=close)
    torch.testing.assert_close(two.cpu(), known, rtol=1e-4, atol=close)


def explorer() -> None:
    shown = gk.Explorer(data(), methods=["frozen", "bias"])
    shown.choose(method="bias", epochs=1).train()
    shown.wait()
    answer = shown.model(image())
    assert answer.device.type == "cpu"


def build_model() -> None:
    meta = {"date": torch.tensor([[[2024.0, 10.0]]] * 2), "lonlat": torch.zeros(2, 2)}
    model = gk.build_model(backbone(), "unet").to(GPU)
    model.calibrate([model.features(image())])
    answers_everywhere(model, image(), meta)
    maps = model.features(image=image(), meta=meta)
    assert {m.device.type for m in maps} == {"cpu"}
    assert model.from_features(maps, (32, 32)).device.type == "cpu"
    assert model(image=image()).device.type == "cpu"
    pair = gk.build_model(backbone(), "linear", "change")
    answers_everywhere(pair, torch.stack([image()] * 2, dim=2))
    finer = gk.build_model(backbone(), "linear", "super_resolution", num_classes=6)
    answers_everywhere(finer, image())


def load_backbone() -> None:
    network = backbone()
    answers_everywhere(network, image())
    units = network.normalised(image())
    assert units.device.type == "cpu"
    torch.testing.assert_close(network.reflectance(units), image())


def combine() -> None:
    network = backbone().to(GPU)
    adapters = [gk.attach(network, "lora", rank=rank) for rank in (1, 2)]
    gk.combine(adapters)
    answers_everywhere(network, image())


def load_adapter() -> None:
    trained().backbone.adapter.save(FOLDER / "adapter")
    other = backbone().to(GPU)
    gk.load_adapter(other, FOLDER / "adapter")
    ours, its = trained().backbone(image())[-1], other(image())[-1]
    torch.testing.assert_close(its, ours)


def area_of_applicability() -> None:
    area = gk.area_of_applicability(trained(), data())
    for given in (image(), image().to(GPU)):
        assert area(given).device.type == "cpu"
        assert area.inside(given).device.type == "cpu"
    path = gk.predict_scene(
        area, scene(), FOLDER / "area.tif", scale=1e-4, progress=False
    )
    assert path.exists()


def pretrain() -> None:
    run = gk.pretrain(
        backbone(), data(), teacher=backbone(), epochs=1, batch_size=4, progress=False
    )
    hidden, painted = run.reconstruct(image())
    again, _ = run.reconstruct(image().to(GPU))
    assert hidden.device.type == painted.device.type == "cpu"
    assert torch.equal(hidden, again), "other cells for an image on the GPU"


def pretrain_geo_aware() -> None:
    network = backbone()
    weights = {"place": 0.0}
    run = gk.pretrain_geo_aware(network, data(), 2, 4, weights=weights)
    rebuilt, *_ = run.heads(network(image()))
    assert rebuilt.device.type == "cpu"


def compare() -> None:
    rows = [gk.Candidate("bias", "bias")]
    found = gk.compare(rows, data(), epochs=1, seeds=(0,), progress=False)
    for model in found.trained.values():
        assert model.activate()(image()).device.type == "cpu"


@cache
def scene() -> Path:
    path = FOLDER / "scene.tif"
    pixels = np.random.default_rng(0).uniform(0, 3000, (6, 48, 40)).astype(np.uint16)
    place = from_origin(500_000, 5e6, 10, 10)
    kind = {"count": 6, "height": 48, "width": 40, "dtype": "uint16"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=place, **kind) as file:
        file.write(pixels)
        file.descriptions = BANDS
    return path


def load_model() -> None:
    """Saved from the GPU, loaded on the CPU: the same answers."""
    model = gk.load_model(gk.save_model(trained(), FOLDER / "model"))
    answers = model(image()), trained()(image())
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


def predict_scene() -> Path:
    return gk.predict_scene(
        trained(), scene(), FOLDER / "map.tif", scale=1e-4, progress=False
    )


def layers() -> list[gk.MapLayer]:
    chips = [on_gpu(sample())]
    with torch.no_grad():
        guess = trained()(image().to(GPU))[0]
    guesses = {"classes": [guess.argmax(0)], "chances": [guess.softmax(0)]}
    return gk.chip_layers(
        chips, BANDS, ("low", "high"), predictions=guesses, distances=[guess[0]]
    )


def raster() -> None:
    place = from_origin(500_000, 5e6, 10, 10)
    made = gk.Raster(image()[0].to(GPU), place, "EPSG:32633")
    assert isinstance(made.array, np.ndarray)


def selective_scan() -> None:
    block = gk.SelectiveScanBlock(8).to(GPU)  # a layer: its tensors are where it is
    assert block(torch.rand(2, 5, 8, device=GPU)).device == GPU


def baseline(name: str, task: str = "segmentation", *more: Any) -> Callable[[], None]:
    def call() -> None:
        chips = data().for_super_resolution(2) if name == "Bicubic" else data(task)
        rival = getattr(gk.baselines, name)(chips, *more)
        answers_everywhere(rival, image())
        gk.evaluate(rival, chips, "val")

    return call


CALLS: dict[str, Callable[[], Any]] = {
    "Explorer": explorer,
    "Raster": raster,
    "SelectiveScanBlock": selective_scan,
    "area_of_applicability": area_of_applicability,
    "attach": lambda: gk.attach(backbone().to(GPU), "lora").backbone(image()),
    "build_model": build_model,
    "chip_layers": layers,
    "combine": combine,
    "compare": compare,
    "estimate_memory": lambda: gk.estimate_memory(trained()),
    "evaluate": lambda: gk.evaluate(trained(), data()),
    "export_prediction": lambda: gk.export_prediction(
        predict_scene(), FOLDER, ("low", "high")
    ),
    "fit": lambda: answers_everywhere(trained(), image()),
    "load_adapter": load_adapter,
    "load_backbone": load_backbone,
    "load_model": load_model,
    "predict_scene": predict_scene,
    "pretrain": pretrain,
    "pretrain_geo_aware": pretrain_geo_aware,
    "region_gap": lambda: gk.region_gap({"lora": trained()}, data(), resamples=5),
    "save_model": lambda: gk.save_model(trained(), FOLDER / "saved"),
    "save_map": lambda: gk.save_map(layers(), FOLDER / "map.html"),
    "score_regions": lambda: gk.score_regions(trained(), data(), resamples=5),
    "selective_scan": selective_scan,
    "show_map": lambda: gk.show_map(layers()),
    "baselines.Bicubic": baseline("Bicubic"),
    "baselines.Constant": baseline("Constant"),
    "baselines.IndexThreshold": baseline("IndexThreshold", "segmentation", "NDVI"),
    "baselines.PixelStatistics": baseline("PixelStatistics"),
    "plots.plot_errors": lambda: gk.plots.plot_errors(
        on_gpu(sample()), sample()["mask"].to(GPU), BANDS, ("low", "high")
    ),
    "plots.plot_spectrum": lambda: gk.plots.plot_spectrum(
        {"mean": image().to(GPU).mean((0, 2, 3))}, BANDS
    ),
    "plots.plot_tokens": lambda: gk.plots.plot_tokens(
        trained().backbone(image().to(GPU)), on_gpu(sample())
    ),
    "plots.show_chip": lambda: gk.plots.show_chip(on_gpu(sample()), BANDS),
    "plots.show_chips": lambda: gk.plots.show_chips([on_gpu(sample())] * 2, BANDS),
}


def public_callables() -> set[str]:
    """Names of everything public that can be called, as `gk.` sees them."""
    names = {name for name in gk.__all__ if callable(getattr(gk, name))}
    names |= {f"plots.{n}" for n in gk.plots.__all__ if callable(getattr(gk.plots, n))}
    for module in (gk.baselines, gk.bands):
        home = module.__name__
        own = [
            n for n, x in vars(module).items() if getattr(x, "__module__", 0) == home
        ]
        names |= {f"{home.rpartition('.')[2]}.{n}" for n in own if n[0] != "_"}
    return names


def main() -> int:
    mpl.use("agg")
    torch.set_num_threads(1)
    failed = 0
    for name, call in CALLS.items():
        try:
            call()
        except Exception:
            failed += 1
            print(f"--- {name}\n{traceback.format_exc(limit=-4)}", flush=True)
        mpl.pyplot.close("all")
    print(f"{failed} of {len(CALLS)} calls fail")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
