"""What a map is made of: georeferenced rasters, layers, and the layers of chips."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.transform import Affine, from_bounds

from geopeft_kit.pictures import Colours, as_numpy
from geopeft_kit.scenes.rasters import class_look

KINDS = ("image", "classes", "values", "errors")
OUTSIDE = "#767676"


@dataclass(frozen=True)
class Raster:
    """A georeferenced array.

    Args:
        array: (C, H, W) or (H, W).
        transform: From pixels to coordinates, as rasterio's.
        crs: Anything that names a coordinate system: "EPSG:32630", a rasterio CRS.
        place: Name of the region, for the map's "go to".
    """

    array: Any
    transform: Affine
    crs: Any
    place: str = ""

    def __post_init__(self) -> None:
        """Take tensors of any device."""
        object.__setattr__(self, "array", as_numpy(self.array))

    @property
    def stack(self) -> np.ndarray:
        """(C, H, W), also of a (H, W) array."""
        return self.array if self.array.ndim == 3 else self.array[None]


Source = str | os.PathLike[str] | Raster


@dataclass(frozen=True)
class MapLayer:
    """One layer of a map.

    Args:
        name: Label of its switch.
        source: Path of a raster, a `Raster`, or several of them (chips).
        kind: "image" (three bands as a picture), "classes", "values" (a colour ramp),
            or "errors" (where a class map differs from `truth`).
        bands: Bands of an image, in its order; by default the file's descriptions.
        show: Which three bands an image shows: "true", "false", "swir" or three names.
        classes: Class names; by default those written by `gk.predict_scene`.
        colours: One per class; by default the file's colour table.
        truth: The reference of an error layer, in the same form as `source`.
        probabilities: Of each class, (K, H, W), in the same form as `source`; shown
            where a pixel of a class map is clicked.
        nodata: Value that is left transparent, as NaN and the file's own nodata are;
            255 for classes.
        limits: Lowest and highest value of a ramp; by default the 2nd and 98th
            percentile.
        unit: Unit of the values, for the legend.
        visible: Switched on at first.
        opacity: 0 to 1.
    """

    name: str
    source: Source | Sequence[Source]
    kind: str = "image"
    bands: str | Sequence[str] | None = None
    show: str | Sequence[str] = "true"
    classes: Sequence[str] | None = None
    colours: Colours | None = None
    truth: Source | Sequence[Source] | None = None
    probabilities: Source | Sequence[Source] | None = None
    nodata: float | None = None
    limits: tuple[float, float] | None = None
    unit: str = ""
    visible: bool = True
    opacity: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"Layer {self.name!r}: kind={self.kind!r}. Allowed: {', '.join(KINDS)}."
            )
        if not 0 <= self.opacity <= 1:
            raise ValueError(
                f"Layer {self.name!r}: opacity={self.opacity} is not within 0 and 1."
            )
        if (self.truth is not None) != (self.kind == "errors"):
            raise ValueError(
                f"Layer {self.name!r}: truth= belongs to kind='errors', and only there."
            )
        if self.probabilities is not None and self.kind != "classes":
            raise ValueError(
                f"Layer {self.name!r}: probabilities= belongs to kind='classes'."
            )


def sources_of(source: Source | Sequence[Source]) -> list[Source]:
    """One raster or many, as a list."""
    if isinstance(source, str | os.PathLike | Raster):
        return [source]
    found = list(source)
    if not found:
        raise ValueError("A layer has an empty list of rasters. Leave the layer out.")
    return found


def classes_of(layer: MapLayer) -> tuple[list[str], list[str]]:
    """Class names and "#rrggbb" colours of a layer: its own, or those of its file."""
    first = sources_of(layer.source)[0]
    path = None if isinstance(first, Raster) else first
    return class_look(path, layer.classes, layer.colours, f"Layer {layer.name!r}")


def chip_layers(
    samples: Sequence[Mapping[str, Any]],
    bands: str | Sequence[str],
    classes: Sequence[str],
    colours: Colours | None = None,
    predictions: Mapping[str, Sequence[Any]] | None = None,
    ignore_index: int = 255,
    show: str | Sequence[str] = "true",
    false_colour: bool = False,
    distances: Sequence[Any] | None = None,
    threshold: float | None = None,
) -> list[MapLayer]:
    """The layers of a set of chips: image, truth, each prediction, and its errors.

    Args:
        samples: Sample dicts with image (C, H, W), mask (H, W), bounds, crs, region.
        bands: Bands of the images.
        classes: Class names.
        colours: One per class.
        predictions: Name -> per sample a (H, W) class map, or (K, H, W) probabilities.
            The highest probability becomes a layer of confidence.
        ignore_index: Value of a mask that means "not labelled".
        show: Which three bands the image shows.
        false_colour: Show the image a second time, with the near infrared as red.
        distances: Per sample (H, W) dissimilarity, from `gk.area_of_applicability`.
        threshold: Where the area of applicability ends; its own layer hides the rest.

    Returns:
        Layers for `show_map`, from bottom to top; image and truth are switched on.
    """
    samples = list(samples)
    look = {"classes": classes, "colours": colours, "nodata": ignore_index}
    truth = chip_rasters(samples, [sample["mask"] for sample in samples])
    images = chip_rasters(samples, [sample["image"] for sample in samples])
    layers = [MapLayer("image", images, bands=bands, show=show)]
    if false_colour:
        second = MapLayer("image, false colour", images, bands=bands, show="false",
                          visible=False)  # fmt: skip
        layers.append(second)
    layers.append(MapLayer("truth", truth, "classes", **look))  # type: ignore[arg-type]
    for name, maps in (predictions or {}).items():
        layers += _prediction_layers(name, maps, samples, truth, look)
    if distances is not None:
        layers += _distance_layers(samples, distances, threshold)
    return layers


def _prediction_layers(
    name: str, maps: Sequence[Any], samples: Sequence[Any], truth: Any, look: Any
) -> list[MapLayer]:
    """Class map, errors and, from probabilities, the confidence of one method."""
    arrays = [as_numpy(one) for one in maps]
    chances, confidence = None, []
    if arrays and arrays[0].ndim == 3:
        chances = chip_rasters(samples, arrays, name)
        highest = chip_rasters(samples, [one.max(axis=0) for one in arrays])
        limits = (1 / len(arrays[0]), 1.0)
        confidence = [MapLayer(f"confidence of {name}", highest, "values",
                               limits=limits, visible=False)]  # fmt: skip
        arrays = [one.argmax(axis=0) for one in arrays]
    rasters = chip_rasters(samples, arrays, name)
    look = {**look, "visible": False}
    return [
        MapLayer(name, rasters, "classes", probabilities=chances, **look),
        MapLayer(f"errors of {name}", rasters, "errors", truth=truth, **look),
        *confidence,
    ]


def _distance_layers(
    samples: Sequence[Any], distances: Sequence[Any], threshold: float | None
) -> list[MapLayer]:
    """The dissimilarity, and a grey cover outside the area."""
    arrays = [as_numpy(one).squeeze() for one in distances]
    rasters = chip_rasters(samples, arrays, "distances")
    layers = [MapLayer("distance to training", rasters, "values", visible=False)]
    if threshold is None:
        return layers
    beyond = [np.where(one > threshold, 0, 255) for one in arrays]
    outside = MapLayer("outside the area of applicability",
                       chip_rasters(samples, beyond), "classes", classes=["outside"],
                       colours=[OUTSIDE], visible=False, opacity=0.7)  # fmt: skip
    return [*layers, outside]


def chip_rasters(
    samples: Sequence[Mapping[str, Any]], arrays: Sequence[Any], name: str = ""
) -> list[Raster]:
    """One array (C, H, W) or (H, W) per chip, at the chip's place.

    Raises ValueError, which names the arrays, where their number is another, or a chip
    is not georeferenced.
    """
    if len(arrays) != len(samples):
        raise ValueError(
            f"{name!r} has {len(arrays)} predictions for {len(samples)} chips. Pass "
            "one per chip, in the same order."
        )
    return [_chip_raster(s, array) for s, array in zip(samples, arrays, strict=True)]


def _chip_raster(sample: Mapping[str, Any], array: Any) -> Raster:
    if "bounds" not in sample or not sample.get("crs"):
        raise ValueError(
            f"Chip {sample.get('chip', '?')!r} has no bounds and crs, so it has no "
            "place on a map. Show it with gk.plots.show_chip instead."
        )
    array = as_numpy(array)
    height, width = array.shape[-2:]
    if "transform" in sample:  # rotated rasters are more than their bounds
        rows, columns = sample["image"].shape[-2:]
        own = Affine(*map(float, as_numpy(sample["transform"]).ravel()))
        transform = own @ Affine.scale(columns / width, rows / height)
    else:
        box = map(float, as_numpy(sample["bounds"]).ravel())
        transform = from_bounds(*box, width, height)
    return Raster(array, transform, sample["crs"], str(sample.get("region", "")))
