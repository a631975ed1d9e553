"""Figures: short functions to copy, one colour per method, everything labelled.

Every function returns a matplotlib Figure and changes no global style. Pictures are
drawn north-up. Colours come from the set of Okabe and Ito, which readers with any of
the common colour-vision deficiencies can tell apart; where lines could be confused,
a marker or a label says the same as the colour.

Used in every notebook, from 00 on.

Source:
    Okabe and Ito 2008, "Color universal design", https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .bands import resolve_bands, wavelengths
from .pictures import (
    OKABE_ITO,
    Colours,
    as_numpy,
    class_colours,
    picture_bands,
    stretch,
    stretch_limits,
    token_picture,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per method, the same in every figure, table and map. The methods that are
# compared most wear Okabe and Ito's own eight; relatives wear a shade of the family.
METHOD_COLOURS: Mapping[str, str] = {
    # the two ends, and the rivals that are not adaptations
    "full": "#000000",
    "frozen": "#737373",
    "last_blocks": "#404040",
    "from_scratch": "#d55e00",
    "pixel_statistics": "#b8a48c",
    "spectral_index": "#8a6d4b",
    # a few weights of the network itself
    "bias": "#e69f00",
    "norm": "#f0e442",
    "ia3": "#c98500",
    "ssf": "#f5c45e",
    # low rank and its relatives
    "lora": "#0072b2",
    "dora": "#56b4e9",
    "adalora": "#004c78",
    "vera": "#7d9fc4",
    "loha": "#2f5fd0",
    "lokr": "#8fd0f5",
    "oft": "#00355a",
    "boft": "#5a78a8",
    "fourierft": "#a9bfe0",
    "slr": "#3a8fb7",
    # prompts
    "vpt": "#cc79a7",
    "upetu": "#8f3b6b",
    # small networks beside the layers
    "houlsby": "#009e73",
    "adaptformer": "#006b4e",
    "convpass": "#4fc3a1",
    "conv_adapter": "#a5d6a7",
    "mona": "#5f8f3e",
    "quantised_adapter": "#b3c93c",
    "vit_adapter": "#7a5195",
    "deflect": "#9b1b30",
    "earth_adapter": "#c7a4d8",
}

# One more way to tell relatives apart, for readers and printers without colour.
MARKERS = "osD^vP*Xph"


def method_colour(method: str) -> str:
    """The colour of a method, "#rrggbb", the same in all figures and maps."""
    if method not in METHOD_COLOURS:
        raise ValueError(
            f"No colour is set for the method {method!r}. Known: "
            f"{', '.join(METHOD_COLOURS)}."
        )
    return METHOD_COLOURS[method]


def method_marker(method: str) -> str:
    """The matplotlib marker of a method; neighbours of one family differ."""
    method_colour(method)
    return MARKERS[list(METHOD_COLOURS).index(method) % len(MARKERS)]


# --- chips ----------------------------------------------------------------------------


def show_chip(
    sample: Mapping[str, Any],
    bands: str | Sequence[str],
    show: str | Sequence[str] = "true",
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    ignore_index: int = 255,
    title: str | None = None,
) -> Figure:
    """One chip: the image, and beside it the mask if it has one.

    Args:
        sample: A sample dict: image (C, H, W) reflectance, perhaps mask (H, W),
            region, and bounds with crs, which label the axes.
        bands: The bands of the image.
        show: Which three make the picture, see `picture_bands`.
        classes: Class names; without them the mask is drawn as numbers.
        colours: One per class.
        ignore_index: Value of the mask that means "not labelled", drawn grey.
        title: By default the region.
    """
    panels = 2 if "mask" in sample else 1
    figure, axes = _panels(panels)
    place = _extent(sample)
    image = as_numpy(sample["image"])[picture_bands(bands, show)]
    name = show if isinstance(show, str) else ", ".join(show)
    _draw(axes[0], stretch(image), place, f"image ({name} colour)")
    if panels == 2 and classes is not None:
        _draw_mask(
            axes[1], sample["mask"], place, "truth", classes, colours, ignore_index
        )
        class_legend(figure, classes, colours)
    elif panels == 2:
        values = np.ma.masked_invalid(as_numpy(sample["mask"]))
        _draw(axes[1], values, place, "truth")
        figure.colorbar(axes[1].images[-1], ax=axes[1], shrink=0.8)
    figure.suptitle(_plain(title if title is not None else sample.get("region", "")))
    return figure


def show_chips(
    samples: Sequence[Mapping[str, Any]],
    bands: str | Sequence[str],
    show: str | Sequence[str] = "true",
    columns: int = 4,
) -> Figure:
    """Many chips in a grid, each under its region's name, all in one stretch.

    Args:
        samples: Sample dicts, see `show_chip`.
        bands: The bands of the images.
        show: Which three make the picture.
        columns: Pictures per row.
    """
    chosen = picture_bands(bands, show)
    images = [as_numpy(sample["image"])[chosen] for sample in samples]
    if not images:
        raise ValueError("No chip to show: the list is empty.")
    limits = stretch_limits(images)
    columns = min(columns, len(images))
    figure, axes = _panels(len(images), columns, side=2.2)
    for axis, image, sample in zip(axes, images, samples, strict=False):
        _draw(axis, stretch(image, limits), None, str(sample.get("region", "")))
        axis.set(xlabel="", ylabel="", xticks=[], yticks=[])
    size = " x ".join(str(n) for n in images[0].shape[1:])
    figure.supxlabel(f"chips of {size} pixels, north up", fontsize="small")
    return figure


def plot_errors(
    sample: Mapping[str, Any],
    prediction: Any,
    bands: str | Sequence[str],
    classes: Sequence[str],
    colours: Colours | None = None,
    show: str | Sequence[str] = "true",
    ignore_index: int = 255,
) -> Figure:
    """Image, truth, prediction, and where the two differ.

    Args:
        sample: A sample dict with image and mask, see `show_chip`.
        prediction: (H, W) class numbers.
        bands: The bands of the image.
        classes: Class names.
        colours: One per class.
        show: Which three bands make the picture.
        ignore_index: Value of the mask that counts neither as right nor as wrong.
    """
    truth, guess = as_numpy(sample["mask"]), as_numpy(prediction)
    if truth.shape != guess.shape:
        raise ValueError(
            f"The prediction is {guess.shape}, the mask {truth.shape} pixels. Both "
            "have to be (H, W)."
        )
    figure, axes = _panels(4)
    place = _extent(sample)
    picture = stretch(as_numpy(sample["image"])[picture_bands(bands, show)])
    _draw(axes[0], picture, place, "image")
    look = (classes, colours, ignore_index)
    _draw_mask(axes[1], truth, place, "truth", *look)
    _draw_mask(axes[2], guess, place, "prediction", *look)
    class_legend(figure, classes, colours)
    counted = truth != ignore_index
    wrong = (truth != guess) & counted
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.6 + 0.4
    grey[wrong] = tuple(
        int(OKABE_ITO["vermillion"][i : i + 2], 16) / 255 for i in (1, 3, 5)
    )
    share = wrong.sum() / max(counted.sum(), 1)
    _draw(axes[3], grey, place, f"wrong (orange): {share:.1%}")
    figure.suptitle(_plain(sample.get("region", "")))
    return figure


def class_legend(
    figure: Figure, classes: Sequence[str], colours: Colours | None
) -> None:
    """Colour patches and names of the classes, under a figure's panels."""
    from matplotlib.patches import Patch

    pairs = zip(classes, class_colours(classes, colours), strict=True)
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor="0.4", label=_plain(n)) for n, c in pairs
        ],
        loc="outside lower center",
        ncols=min(6, len(classes)),
        fontsize="small",
        frameon=False,
    )


def plot_tokens(features: Any, sample: Mapping[str, Any] | None = None) -> Figure:
    """Feature maps as colours, one panel per map.

    Args:
        features: One map (D, h, w), or a list of them, for instance what a backbone
            gives for one image.
        sample: Sample dict of the image, for its place on Earth.
    """
    maps = [features] if hasattr(features, "shape") else list(features)
    maps = [as_numpy(m)[0] if m.ndim == 4 else as_numpy(m) for m in maps]
    figure, axes = _panels(len(maps))
    for number, (axis, one) in enumerate(zip(axes, maps, strict=True), start=1):
        width, high, wide = one.shape
        title = f"map {number}: {width} features, {high} x {wide}"
        _draw(axis, token_picture(one), _extent(sample or {}), title)
        if sample is None or "bounds" not in sample:
            axis.set(xlabel="column (patches)", ylabel="row (patches)")
    return figure


# --- runs -----------------------------------------------------------------------------


def plot_history(
    histories: Mapping[str, pd.DataFrame], metric: str, loss: str = "loss"
) -> Figure:
    """Loss and score against epochs, one line per method.

    Args:
        histories: Method -> `run.history`, one row per epoch, column `epoch`.
        metric: Column of the score, for instance "val_miou".
        loss: Column of the loss.
    """
    figure, axes = _panels(2, side=3.6)
    for method, history in histories.items():
        for axis, column in zip(axes, (loss, metric), strict=True):
            if column not in history:
                raise ValueError(
                    f"The history of {method!r} has no column {column!r}. It has "
                    f"{', '.join(map(str, history.columns))}."
                )
            known = history.dropna(subset=[column])
            axis.plot(known["epoch"], known[column], **_style(method), markersize=4)
    axes[0].set(xlabel="epoch", ylabel=loss.replace("_", " "))
    axes[1].set(xlabel="epoch", ylabel=metric.replace("_", " "))
    axes[1].legend(frameon=False, fontsize="small")
    return figure


def plot_resources(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """Memory of each method as one stacked bar.

    Args:
        parts: Method -> part ("weights", "gradients", "optimiser", "activations")
            -> bytes.
    """
    figure, (axis,) = _panels(1, side=4.2)
    figure.set_size_inches(6.5, 0.9 + 0.4 * len(parts))
    names = list(dict.fromkeys(part for one in parts.values() for part in one))
    shades = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#999999", "#f0e442"]
    left = np.zeros(len(parts))
    for name, shade in zip(names, shades, strict=False):
        size = np.array([one.get(name, 0) for one in parts.values()]) / 2**20
        axis.barh(list(parts), size, left=left, color=shade, label=_plain(name))
        left += size
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:,.0f}", va="center", fontsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("memory (MiB)")
    axis.legend(frameon=False, fontsize="small", ncols=len(names), loc="lower center",
                bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    return figure


def plot_scores(scores: pd.DataFrame, metric: str = "miou") -> Figure:
    """Scores per region: a dot is the mean over seeds, a line their range.

    Args:
        scores: Long table with the columns method, region, seed and the metric.
        metric: Column to draw.
    """
    missing = {"method", "region", metric} - set(scores.columns)
    if missing:
        raise ValueError(
            f"The table has no column {', '.join(sorted(missing))}. It has "
            f"{', '.join(map(str, scores.columns))}."
        )
    regions, methods = list(scores["region"].unique()), list(scores["method"].unique())
    figure, (axis,) = _panels(1, side=4.2)
    figure.set_size_inches(6.5, 0.9 + 0.22 * len(regions) * (len(methods) + 1))
    for shift, method in zip(
        np.linspace(-0.35, 0.35, len(methods)), methods, strict=True
    ):
        rows = scores[scores["method"] == method].groupby("region")[metric]
        table = rows.agg(["mean", "min", "max"]).reindex(regions)
        height = np.arange(len(regions)) + (shift if len(methods) > 1 else 0)
        spread = [table["mean"] - table["min"], table["max"] - table["mean"]]
        style = {**_style(method), "linestyle": "none", "elinewidth": 1.5}
        axis.errorbar(table["mean"], height, xerr=spread, markersize=5, **style)
    axis.set_yticks(range(len(regions)), [_plain(region) for region in regions])
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.set(xlabel=f"{metric} (dot: mean over seeds, line: lowest to highest)")
    axis.set_ylabel("region")
    axis.legend(
        frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )
    return figure


def plot_split(index: Any, title: str = "", view: Sequence[float] | None = None) -> Any:
    """Where the chips of each split lie.

    Args:
        index: GeoDataFrame with footprints in degrees and the column `split`, as
            `ChipData.index`.
        title: Above the figure.
        view: West, south, east, north of a part to look at; by default all.

    Returns:
        The figure. Footprints too small to see carry a mark in their middle.
    """
    placed = index[index.geometry.notna()]
    if view is not None:
        placed = placed.cx[view[0] : view[2], view[1] : view[3]]
    if placed.empty:
        raise ValueError("No chip has a place here. Pass another view, or view=None.")
    figure, (axis,) = _panels(1, side=4.6)
    west, south, east, north = view or placed.total_bounds
    for split, (colour, marker, size) in SPLIT_STYLES.items():
        rows = placed[placed["split"] == split]
        if rows.empty:
            continue
        rows.plot(ax=axis, facecolor=colour, edgecolor=colour, alpha=0.55, zorder=3)
        left, low, right, high = rows.bounds.to_numpy().T
        wide = (right - left).max() / (east - west or 1)
        tall = (high - low).max() / (north - south or 1)
        if max(wide, tall) < 0.02:
            middle = (left + right) / 2, (low + high) / 2
            axis.scatter(*middle, size, colour, marker=marker, zorder=4)
        axis.plot([], [], marker, color=colour, label=f"{split} ({len(rows)})")
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    if view is not None:
        axis.set(xlim=(west, east), ylim=(south, north))
    shape = 1 / np.cos(np.radians((south + north) / 2))
    axis.set_aspect(shape, adjustable="datalim" if view is None else "box")
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(nbins=5)
    axis.tick_params(labelsize="small")
    axis.grid(color="0.92")
    axis.set_title(_plain(title), fontsize="medium")
    figure.legend(frameon=False, fontsize="small", ncols=4, loc="outside lower center")
    return figure


# Colour, marker and its size: later ones are smaller, so that all stay in sight.
SPLIT_STYLES: Mapping[str, tuple[str, str, int]] = {
    "train": (OKABE_ITO["blue"], "o", 130),
    "val": (OKABE_ITO["sky"], "s", 36),
    "test": (OKABE_ITO["vermillion"], "^", 60),
    "unused": ("#999999", "x", 25),
}


def plot_spectrum(
    spectra: Mapping[str, Sequence[float]], bands: str | Sequence[str]
) -> Figure:
    """Reflectance of pixels over wavelength.

    Args:
        spectra: Name -> one value per band.
        bands: The bands. Where one has no wavelength, bands stand side by side.
    """
    try:
        names: Sequence[str] = resolve_bands(bands)
        places: Sequence[float] = wavelengths(names)
        label = "wavelength (micrometres)"
    except ValueError:
        names = [bands] if isinstance(bands, str) else list(map(str, bands))
        places, label = range(len(names)), "band"
    figure, (axis,) = _panels(1, side=3.4)
    figure.set_size_inches(3.8, 2.6)
    order = np.argsort(places)
    for (name, values), marker in zip(spectra.items(), MARKERS * 9, strict=False):
        heights = np.asarray(values, dtype=float)[order]
        axis.plot(np.asarray(places)[order], heights, marker=marker, label=_plain(name))
    axis.set(xlabel=label, ylabel="reflectance")
    if label == "band":
        axis.set_xticks(range(len(names)), [_plain(n) for n in names], rotation=90)
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize="small")
    return figure


def plot_gap(gaps: pd.DataFrame) -> Figure:
    """Seen and unseen score of each method, with their intervals.

    Args:
        gaps: From `gk.region_gap`.
    """
    figure, (axis,) = _panels(1, side=4.2)
    figure.set_size_inches(6.5, 1.2 + 0.45 * len(gaps))
    for height, row in enumerate(gaps.to_dict("records")):
        colour = METHOD_COLOURS.get(row["method"], OKABE_ITO["black"])
        axis.plot([row["seen"], row["unseen"]], [height] * 2, color=colour, alpha=0.4)
        for side, shift, face in (("seen", -0.1, "white"), ("unseen", 0.1, colour)):
            value = row[side]
            reach = [[value - row[f"{side}_low"]], [row[f"{side}_high"] - value]]
            style = {"marker": "o", "color": colour, "markerfacecolor": face}
            axis.errorbar(value, height + shift, xerr=reach, elinewidth=1.5, **style)
    axis.plot([], [], "o", color="0.3", markerfacecolor="white", label="seen regions")
    axis.plot([], [], "o", color="0.3", label="unseen regions")
    axis.set_yticks(range(len(gaps)), [_plain(name) for name in gaps["method"]])
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.set(xlabel=f"{gaps['metric'].iloc[0]} (line: bootstrap interval over chips)")
    axis.set_ylabel("method")
    axis.legend(
        frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )
    return figure


def _style(method: str) -> dict[str, Any]:
    colour, marker = method_colour(method), method_marker(method)
    return {"color": colour, "marker": marker, "label": _plain(method)}


# --- drawing --------------------------------------------------------------------------


def _panels(count: int, columns: int | None = None, side: float = 3.2) -> Any:
    """A figure that no global state holds on to, and a flat list of its axes."""
    from matplotlib.figure import Figure

    columns = columns or count
    rows = -(-count // columns)
    size = (side * columns + 0.4, side * rows + 0.4)

    class NotebookFigure(Figure):
        """Draws itself in a notebook, also where pyplot was never imported."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", bbox_inches="tight")
            return picture.getvalue()

    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _extent(sample: Mapping[str, Any]) -> tuple[list[float], str] | None:
    """(west, east, south, north) and unit of a sample, if it lies on Earth."""
    if "bounds" not in sample or not sample.get("crs"):
        return None
    import rasterio.crs

    west, south, east, north = (float(v) for v in as_numpy(sample["bounds"]).ravel())
    if rasterio.crs.CRS.from_user_input(sample["crs"]).is_geographic:
        return [west, east, south, north], "degrees"
    return [west / 1000, east / 1000, south / 1000, north / 1000], "km"


def _draw(
    axis: Axes, picture: np.ndarray, place: Any, title: str, **kwargs: Any
) -> None:
    extent, unit = place or (None, "pixels")
    axis.imshow(picture, extent=extent, interpolation="nearest", **kwargs)
    names = ("column", "row") if place is None else ("easting", "northing")
    if unit == "degrees":
        names = ("longitude", "latitude")
    axis.set(xlabel=f"{names[0]} ({unit})", ylabel=f"{names[1]} ({unit})")
    axis.set_title(_plain(title), fontsize="medium")
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(nbins=4)
    axis.tick_params(labelsize="small")


def _draw_mask(
    axis: Axes,
    mask: Any,
    place: Any,
    title: str,
    classes: Sequence[str],
    colours: Colours | None,
    ignore_index: int,
) -> None:
    """A class mask in its colours; what is not labelled stays grey."""
    from matplotlib.colors import ListedColormap

    values = np.ma.masked_equal(as_numpy(mask), ignore_index)
    table = ListedColormap(class_colours(classes, colours))
    axis.set_facecolor("0.85")
    _draw(axis, values, place, title, cmap=table, vmin=-0.5, vmax=len(classes) - 0.5)


def _plain(text: Any) -> str:
    """Text as it is: a "$" in a class name starts no formula."""
    return str(text).replace("$", r"\$")
