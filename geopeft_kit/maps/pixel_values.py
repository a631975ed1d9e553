"""The values of all layers of a map at one pixel, as a click shows them.

They are read from the sources, not from the warped and coloured pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rasterio.transform import Affine
from rasterio.warp import transform as to_crs
from rasterio.windows import Window

from geopeft_kit.bands import resolve_bands
from geopeft_kit.maps.layers import MapLayer, Raster, Source, classes_of, sources_of
from geopeft_kit.maps.page import markup
from geopeft_kit.open_raster import open_raster
from geopeft_kit.pictures import png_url
from geopeft_kit.plots import plot_spectrum
from geopeft_kit.plots.drawing import figure_png


@dataclass(frozen=True)
class Reading:
    """The content of one layer at a pixel.

    Attributes:
        names: Band names, class names, or nothing.
        values: Reflectance per band, probability per class (none where the layer has
            no probabilities), or the one value.
        text: The class, or the value with its unit; "" for an image.
    """

    layer: str
    kind: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    text: str = ""


def read_pixel(layers: Sequence[MapLayer], lon: float, lat: float) -> list[Reading]:
    """One reading per layer that has data at a place (degrees), in the layers' order.

    Error layers are skipped.
    """
    found = [_read_layer(layer, lon, lat) for layer in layers if layer.kind != "errors"]
    return [reading for reading in found if reading is not None]


def _read_layer(layer: MapLayer, lon: float, lat: float) -> Reading | None:
    values = _first(layer.source, lon, lat)
    if values is None:
        return None
    if layer.kind == "image":
        if not np.isfinite(values).all():
            return None
        bands = layer.bands or _descriptions(layer)
        names = resolve_bands(bands) if isinstance(bands, str) else tuple(bands)
        return Reading(layer.name, "image", names, tuple(map(float, values)))
    value = float(values[0])
    if layer.kind == "values":
        if not np.isfinite(value) or value == layer.nodata:
            return None
        text = f"{value:.3g} {layer.unit}".strip()
        return Reading(layer.name, "values", (), (value,), text)
    names = tuple(classes_of(layer)[0])
    if not np.isfinite(value) or not 0 <= value < len(names):
        return None
    probabilities: tuple[float, ...] = ()
    if layer.probabilities is not None:
        found = _first(layer.probabilities, lon, lat)
        probabilities = () if found is None else tuple(map(float, found))
    return Reading(layer.name, "classes", names, probabilities, names[int(value)])


def _first(
    source: Source | Sequence[Source], lon: float, lat: float
) -> np.ndarray | None:
    """(C,) of the last source, the top one, that has a pixel there."""
    for one in reversed(sources_of(source)):
        values = _pixel(one, lon, lat)
        if values is not None:
            return values
    return None


def _pixel(source: Source, lon: float, lat: float) -> np.ndarray | None:
    if isinstance(source, Raster):
        shape = source.stack.shape[1:]
        place = _place(source.transform, source.crs, shape, lon, lat)
        return None if place is None else source.stack[:, place[0], place[1]]
    with open_raster(source) as raster:
        shape = (raster.height, raster.width)
        place = _place(raster.transform, raster.crs, shape, lon, lat)
        if place is None:
            return None
        window = Window(place[1], place[0], 1, 1)
        values = raster.read(window=window, masked=True).astype(np.float32)
        scaled = values.filled(np.nan)[:, 0, 0] * np.array(raster.scales)
        return scaled + np.array(raster.offsets)


def _place(
    transform: Affine, crs: object, shape: Sequence[int], lon: float, lat: float
) -> tuple[int, int] | None:
    """Row and column of the pixel at a place, None outside the raster."""
    (x,), (y,) = to_crs("EPSG:4326", crs, [lon], [lat])
    column, row = (int(np.floor(v)) for v in ~transform @ (x, y))
    inside = 0 <= row < shape[0] and 0 <= column < shape[1]
    return (row, column) if inside else None


def _descriptions(layer: MapLayer) -> Sequence[str]:
    first = sources_of(layer.source)[0]
    if isinstance(first, Raster):
        return [f"band {i}" for i in range(len(first.array))]
    with open_raster(first) as raster:
        return [name or f"band {i}" for i, name in enumerate(raster.descriptions)]


def pixel_html(readings: Sequence[Reading], lon: float, lat: float) -> str:
    """Readings as HTML: bars for probabilities, a spectrum for bands; names escaped."""
    lines: list[tuple] = []
    images: dict[tuple[str, ...], Reading] = {}
    for reading in readings:
        if reading.kind == "image":  # true and false colour are one spectrum
            images.setdefault(reading.names, reading)
            continue
        bars = []
        if reading.kind == "classes" and reading.values:
            shares = np.clip(reading.values, 0, 1).tolist()
            bars = list(zip(reading.names, shares, strict=True))
        lines.append((reading.layer, reading.text, bars))
    spectra = []
    for names, reading in images.items():
        figure = plot_spectrum({reading.layer: reading.values}, names)
        pairs = zip(names, reading.values, strict=True)
        text = ", ".join(f"{name} {value:.3f}" for name, value in pairs)
        spectra.append((png_url(figure_png(figure)), text))
    return markup("pixel", place_text(lon, lat), lines, spectra)


def place_text(lon: float, lat: float, digits: int = 6) -> str:
    """Degrees as text: 1.500000° N, 2.000000° W."""
    ns, ew = "NS"[lat < 0], "EW"[lon < 0]
    return f"{abs(lat):.{digits}f}° {ns}, {abs(lon):.{digits}f}° {ew}"
