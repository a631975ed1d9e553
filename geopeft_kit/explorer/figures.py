"""The explorer's pictures: a chip with its errors, the trade-off plot, the map."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import shapely
from matplotlib.figure import Figure

from geopeft_kit import plots
from geopeft_kit.data.chips import ChipData
from geopeft_kit.explorer.session import KeptRun, Session, pareto_front
from geopeft_kit.maps.layers import MapLayer, chip_layers, chip_rasters
from geopeft_kit.maps.scene_map import SceneMap, show_map
from geopeft_kit.model import WHOLE_IMAGE_TASKS
from geopeft_kit.pictures import as_numpy, picture_bands, stretch, stretch_limits
from geopeft_kit.plots.drawing import figure_png, plain_text
from geopeft_kit.training.evaluate import HEADLINE

DPI = 110
CHIPS = 6  # places on the map, spread over the test split
IN_BOX = 24  # places that a box drawn on the map may add


def positions_of(data: ChipData, count: int = CHIPS) -> list[int]:
    """Positions of a few chips, spread evenly over the test split."""
    total = len(data.dataset("test"))
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def sample_at(data: ChipData, position: int) -> dict[str, Any]:
    """A chip of the test split as it is drawn; of two dates, the later one."""
    sample = dict(data.dataset("test")[position])
    if sample["image"].ndim == 4:
        sample["image"] = sample["image"][:, -1]  # (C, 2, H, W) -> (C, H, W)
    return sample


def chip_png(
    session: Session, data: ChipData, run: KeptRun | None, position: int, show: Any
) -> bytes:
    """Image and truth of a chip, and the prediction and errors of a run, as PNG."""
    figure = _chip_figure(session, data, run, position, show)
    return figure_png(figure, dpi=DPI)


def _chip_figure(
    session: Session, data: ChipData, run: KeptRun | None, position: int, show: Any
) -> Figure:
    sample = sample_at(data, position)
    guess = None if run is None else session.predict(run, position)
    if "mask" not in sample:
        title = _whole_image_title(sample, guess, data)
        return plots.show_chip(sample, data.bands, show, title=title)
    if data.task == "super_resolution":
        return _finer_figure(sample, guess, data, show)
    if data.classes is None:
        return _values_figure(sample, guess, data, show)
    look: dict[str, Any] = {
        "classes": data.classes,
        "colours": data.colours,
        "show": show,
        "ignore_index": data.ignore_index,
    }
    if guess is None:
        return plots.show_chip(sample, data.bands, **look)
    return plots.plot_errors(sample, guess, data.bands, **look)


def _whole_image_title(sample: Mapping[str, Any], guess: Any, data: ChipData) -> str:
    """Truth and answer in words."""

    def words(label: Any) -> str:
        values = np.ravel(as_numpy(label))
        numbers = np.flatnonzero(values) if data.task == "multilabel" else values
        names = data.classes or [str(i) for i in range(data.num_classes)]
        return ", ".join(names[int(i)] for i in numbers) or "nothing"

    title = f"{sample['region']}. Truth: {words(sample['label'])}"
    return title if guess is None else f"{title}. Prediction: {words(guess)}"


def _values_figure(
    sample: Mapping[str, Any], guess: Any, data: ChipData, show: Any
) -> Figure:
    """Regression: image, truth, and prediction on the truth's scale."""
    truth = as_numpy(sample["mask"])
    low, high = np.nanmin(truth), np.nanmax(truth)
    panels = {"truth": truth} | ({} if guess is None else {"prediction": guess})
    figure = Figure(figsize=(3.3 + 3.6 * len(panels), 3.4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(panels))
    first.imshow(stretch(as_numpy(sample["image"])[picture_bands(data.bands, show)]))
    first.set(title="image", xlabel="column (pixels)", ylabel="row (pixels)")
    for axis, (title, values) in zip(others, panels.items(), strict=True):
        drawn = axis.imshow(values, vmin=low, vmax=high, interpolation="nearest")
        axis.set(title=title, xlabel="column (pixels)")
    figure.colorbar(drawn, ax=others, shrink=0.8, label="value of the target")
    figure.suptitle(plain_text(sample["region"]))
    return figure


def _finer_figure(
    sample: Mapping[str, Any], guess: Any, data: ChipData, show: Any
) -> Figure:
    """Super-resolution: image, prediction and truth, all in the truth's stretch."""
    panels = {"image": sample["image"], "truth": sample["mask"]}
    if guess is not None:
        panels = {**panels, "prediction": guess}
    chosen = picture_bands(data.bands, show)
    limits = stretch_limits([as_numpy(sample["mask"])[chosen]])
    figure = Figure(figsize=(0.4 + 3.4 * len(panels), 3.6), layout="constrained")
    for axis, (title, bands) in zip(
        figure.subplots(1, len(panels)), panels.items(), strict=True
    ):
        axis.imshow(stretch(as_numpy(bands)[chosen], limits), interpolation="nearest")
        axis.set(title=title, xlabel="column (pixels)", ylabel="row (pixels)")
    figure.suptitle(plain_text(sample["region"]))
    return figure


def trade_off_png(runs: Sequence[KeptRun], shown: KeptRun | None) -> bytes:
    """Held-out score against memory, with the Pareto front; empty without runs."""
    if not runs:
        return b""
    name, larger = HEADLINE[runs[0].model.task]
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    axis = figure.subplots()
    front = pareto_front(list(runs))
    axis.step(
        [r.memory for r in front], [r.score() for r in front], where="post",
        color="0.55", linestyle="--", linewidth=1.2, zorder=1, label="Pareto front",
    )  # fmt: skip
    for run in runs:
        method = run.choice.method
        axis.scatter(
            run.memory, run.score(), s=90 if run is shown else 46, zorder=2,
            color=plots.method_colour(method), marker=plots.method_marker(method),
            edgecolors="black" if run is shown else "none", linewidths=1.4,
        )  # fmt: skip
        axis.annotate(
            f" {run.number} {method}", (run.memory, run.score()), fontsize=8,
            xytext=(5, 4), textcoords="offset points",
        )  # fmt: skip
    better = "higher" if larger else "lower"
    axis.set(
        xlabel="memory of a training step (MiB): weights, gradients, optimiser, "
        "activations",
        ylabel=f"held-out {name} ({better} is better)",
    )
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    axis.margins(x=0.16, y=0.18)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure_png(figure, dpi=DPI)


def map_of(
    session: Session, data: ChipData, runs: Sequence[KeptRun], show: Any, height: int
) -> SceneMap:
    """Held-out chips on a map: image, truth, and the predictions and errors of runs.

    Two runs are compared by a swipe. A box drawn on the map adds the held-out chips
    that it touches. Raises ValueError where chips are not georeferenced, or the task
    has no maps.
    """
    if data.task in WHOLE_IMAGE_TASKS:
        raise ValueError(
            f"{data.task} gives one answer per image, so there is no map to draw. The "
            "picture shows truth and prediction in words."
        )
    layers = _layers(session, data, runs, show, positions_of(data))
    names = [run.name for run in runs]
    names = names if len(names) == 2 else ["truth", *names]
    swipe = (names[0], names[1]) if len(names) == 2 else None
    boxes = itertools.count(1)

    def on_box(box: tuple[float, float, float, float]) -> list[MapLayer]:
        found = _layers(session, data, runs, show, positions_in(data, box))
        number = next(boxes)
        return [replace(one, name=f"box {number}: {one.name}") for one in found]

    title = str(data.name)
    return show_map(layers, swipe, height=height, title=title, on_box=on_box)


def positions_in(data: ChipData, box: tuple[float, float, float, float]) -> list[int]:
    """Positions in the test split of the chips that a box (W, S, E, N) touches.

    Raises ValueError where it touches none, or more than `IN_BOX`.
    """
    dataset = data.dataset("test")
    footprints = dataset.table.index.geometry.iloc[dataset.rows]
    found = np.flatnonzero(footprints.intersects(shapely.box(*box))).tolist()
    if not 1 <= len(found) <= IN_BOX:
        raise ValueError(
            f"the box touches {len(found)} of {len(footprints)} held-out chips; draw "
            f"one that touches 1 to {IN_BOX}."
        )
    return found


def _layers(
    session: Session,
    data: ChipData,
    runs: Sequence[KeptRun],
    show: Any,
    positions: Sequence[int],
) -> list[MapLayer]:
    """Image, truth, and for each run its prediction and errors, of some chips."""
    samples = [sample_at(data, position) for position in positions]
    found = {run.name: [session.predict(run, p) for p in positions] for run in runs}
    if data.classes is None:
        return _value_layers(samples, data, found, show)
    return chip_layers(
        samples, data.bands, data.classes, data.colours, found, data.ignore_index, show
    )


def _value_layers(
    samples: Sequence[Mapping[str, Any]],
    data: ChipData,
    found: Mapping[str, Sequence[np.ndarray]],
    show: Any,
) -> list[MapLayer]:
    """The image, and values on one scale: finer images, or those of a regression."""
    truth = [sample["mask"] for sample in samples]
    images = chip_rasters(samples, [sample["image"] for sample in samples])
    picture: dict[str, Any] = {"bands": data.bands, "show": show}
    look = picture
    if data.task == "regression":
        values = np.concatenate([as_numpy(mask).ravel() for mask in truth])
        limits = (float(np.nanmin(values)), float(np.nanmax(values)) or 1.0)
        look = {"kind": "values", "limits": limits}
    layers = [MapLayer("image", images, **picture)]
    for name, arrays in {"truth": truth, **found}.items():
        layers.append(MapLayer(name, chip_rasters(samples, arrays), **look))
    return layers
