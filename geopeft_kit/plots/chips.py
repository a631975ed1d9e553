"""Figures of chips: images, masks, errors, tokens, spectra, splits on a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geopeft_kit.bands import resolve_bands, wavelengths
from geopeft_kit.pictures import (
    OKABE_ITO,
    Colours,
    as_numpy,
    picture_bands,
    rgb_of,
    stretch,
    stretch_limits,
    token_picture,
)
from geopeft_kit.plots.colours import MARKERS, SPLIT_STYLES
from geopeft_kit.plots.drawing import (
    class_legend,
    draw_mask,
    draw_picture,
    extent_of,
    new_panels,
    plain_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_chip(
    sample: Mapping[str, Any],
    bands: str | Sequence[str],
    show: str | Sequence[str] = "true",
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    ignore_index: int = 255,
    title: str | None = None,
) -> Figure:
    """One chip: the image, and its mask if it has one.

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
    figure, axes = new_panels(panels)
    place = extent_of(sample)
    image = as_numpy(sample["image"])[picture_bands(bands, show)]
    name = show if isinstance(show, str) else ", ".join(show)
    draw_picture(axes[0], stretch(image), place, f"image ({name} colour)")
    if panels == 2 and classes is not None:
        draw_mask(
            axes[1], sample["mask"], place, "truth", classes, colours, ignore_index
        )
        class_legend(figure, classes, colours)
    elif panels == 2:
        values = np.ma.masked_invalid(as_numpy(sample["mask"]))
        draw_picture(axes[1], values, place, "truth")
        figure.colorbar(axes[1].images[-1], ax=axes[1], shrink=0.8)
    figure.suptitle(
        plain_text(title if title is not None else sample.get("region", ""))
    )
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
    figure, axes = new_panels(len(images), columns, side=2.2)
    for axis, image, sample in zip(axes, images, samples, strict=False):
        draw_picture(axis, stretch(image, limits), None, str(sample.get("region", "")))
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
    figure, axes = new_panels(4)
    place = extent_of(sample)
    picture = stretch(as_numpy(sample["image"])[picture_bands(bands, show)])
    draw_picture(axes[0], picture, place, "image")
    look = (classes, colours, ignore_index)
    draw_mask(axes[1], truth, place, "truth", *look)
    draw_mask(axes[2], guess, place, "prediction", *look)
    class_legend(figure, classes, colours)
    counted = truth != ignore_index
    wrong = (truth != guess) & counted
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.6 + 0.4
    grey[wrong] = rgb_of([OKABE_ITO["vermillion"]]) / 255
    share = wrong.sum() / max(counted.sum(), 1)
    draw_picture(axes[3], grey, place, f"wrong (orange): {share:.1%}")
    figure.suptitle(plain_text(sample.get("region", "")))
    return figure


def plot_tokens(features: Any, sample: Mapping[str, Any] | None = None) -> Figure:
    """Feature maps as colours, one panel per map.

    Args:
        features: One map (D, h, w), or a list of them, for instance what a backbone
            gives for one image.
        sample: Sample dict of the image, for its place on Earth.
    """
    maps = [features] if hasattr(features, "shape") else list(features)
    maps = [as_numpy(m)[0] if m.ndim == 4 else as_numpy(m) for m in maps]
    figure, axes = new_panels(len(maps))
    for number, (axis, one) in enumerate(zip(axes, maps, strict=True), start=1):
        width, high, wide = one.shape
        title = f"map {number}: {width} features, {high} x {wide}"
        draw_picture(axis, token_picture(one), extent_of(sample or {}), title)
        if sample is None or "bounds" not in sample:
            axis.set(xlabel="column (patches)", ylabel="row (patches)")
    return figure


def plot_spectrum(
    spectra: Mapping[str, Sequence[float]], bands: str | Sequence[str]
) -> Figure:
    """Reflectance of pixels over wavelength.

    Args:
        spectra: Name -> one value per band.
        bands: The bands. Where one has no wavelength, bands are evenly spaced.
    """
    try:
        names: Sequence[str] = resolve_bands(bands)
        places: Sequence[float] = wavelengths(names)
        label = "wavelength (micrometres)"
    except ValueError:
        names = [bands] if isinstance(bands, str) else list(map(str, bands))
        places, label = range(len(names)), "band"
    figure, (axis,) = new_panels(1, side=3.4)
    figure.set_size_inches(3.8, 2.6)
    order = np.argsort(places)
    for (name, values), marker in zip(spectra.items(), MARKERS * 9, strict=False):
        heights = as_numpy(values).astype(float)[order]
        axis.plot(
            np.asarray(places)[order], heights, marker=marker, label=plain_text(name)
        )
    axis.set(xlabel=label, ylabel="reflectance")
    if label == "band":
        axis.set_xticks(range(len(names)), [plain_text(n) for n in names], rotation=90)
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize="small")
    return figure


def plot_split(index: Any, title: str = "", view: Sequence[float] | None = None) -> Any:
    """A map of the chips of each split; very small footprints get a marker.

    Args:
        index: GeoDataFrame with footprints in degrees and the column `split`, as
            `ChipData.index`.
        title: Above the figure.
        view: West, south, east, north of a part; by default everything.
    """
    placed = index[index.geometry.notna()]
    if view is not None:
        placed = placed.cx[view[0] : view[2], view[1] : view[3]]
    if placed.empty:
        raise ValueError("No chip has a place here. Pass another view, or view=None.")
    figure, (axis,) = new_panels(1, side=4.6)
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
    axis.set_title(plain_text(title), fontsize="medium")
    figure.legend(frameon=False, fontsize="small", ncols=4, loc="outside lower center")
    return figure
