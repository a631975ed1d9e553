"""Rasters and chips -> georeferenced pictures for a web map.

A web map stretches a picture linearly in Web Mercator (EPSG:3857), so every layer is
warped to that projection, coloured, and encoded as a PNG data URL: no tile server and
no network. Chips next to each other become one mosaic; chips far apart become separate
places. All layers of a place share one grid, so that truth and prediction are compared
pixel by pixel.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine, array_bounds, from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform_bounds

from geopeft_kit.geodesy import placed
from geopeft_kit.maps.layers import MapLayer, Raster, Source, classes_of, sources_of
from geopeft_kit.open_raster import open_raster
from geopeft_kit.pictures import (
    OKABE_ITO,
    picture_bands,
    png_url,
    rgb_of,
    stretch,
    stretch_limits,
)

MERCATOR = "EPSG:3857"
METRES_PER_DEGREE = np.pi * 6378137 / 180  # of EPSG:3857
MAX_SIDE = 1500  # pixels; a browser keeps every layer of a map in memory
MISSED, FALSE_ALARM = OKABE_ITO["vermillion"], OKABE_ITO["purple"]

Box = tuple[float, float, float, float]  # west, south, east, north


@dataclass(frozen=True)
class Legend:
    """What colours mean: one entry per class, or a ramp from low to high.

    Attributes:
        entries: ("#rrggbb", text) of each class, or of a few steps of the ramp.
        limits: Values at both ends of the ramp; None for classes.
        unit: Of the values.
    """

    entries: tuple[tuple[str, str], ...]
    limits: tuple[float, float] | None = None
    unit: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG data URL and its bounds: ((south, west), (north, east)) in degrees."""

    url: str
    bounds: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class DrawnLayer:
    """A layer as the map shows it."""

    name: str
    pictures: tuple[Picture, ...]
    legend: Legend | None
    visible: bool
    opacity: float
    kind: str = "image"


@dataclass(frozen=True)
class Drawing:
    """All layers, and the places (name, bounds) to go to."""

    layers: tuple[DrawnLayer, ...]
    places: tuple[tuple[str, tuple], ...]


def draw(layers: Sequence[MapLayer], max_side: int = MAX_SIDE) -> Drawing:
    """Warp, colour and encode layers, from bottom to top.

    Places with more than `max_side` pixels along a side are thinned out, and a
    printed line tells.
    """
    layers = list(layers)
    names = [layer.name for layer in layers]
    if not layers or len(set(names)) < len(names):
        raise ValueError(
            f"A map needs one or more layers, each with a unique name; got {names}."
        )
    footprints = [_footprint(s) for la in layers for s in sources_of(la.source)]
    grids = _grids(footprints, max_side)
    drawn = tuple(_draw_layer(layer, grids) for layer in layers)
    return Drawing(drawn, tuple((grid.name, grid.degrees()) for grid in grids))


# --- where: footprints, places, grids -------------------------------------------------


@dataclass(frozen=True)
class _Footprint:
    box: Box  # in EPSG:3857
    pixel: float  # metres of EPSG:3857
    place: str


@dataclass(frozen=True)
class _Grid:
    """The pixels, in EPSG:3857, that all layers of one place share."""

    name: str
    box: Box
    width: int
    height: int

    @property
    def pixel(self) -> tuple[float, float]:
        """Width and height of a pixel in metres of EPSG:3857."""
        west, south, east, north = self.box
        return (east - west) / self.width, (north - south) / self.height

    def transform(self, row: int = 0, column: int = 0) -> Affine:
        """From pixels to coordinates, counted from this row and column."""
        wide, tall = self.pixel
        return from_origin(
            self.box[0] + column * wide, self.box[3] - row * tall, wide, tall
        )

    def holds(self, x: float, y: float) -> bool:
        """Whether it contains a point of EPSG:3857."""
        west, south, east, north = self.box
        return west <= x <= east and south <= y <= north

    def degrees(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """South, west and north, east; a place across 180 degrees ends above 180."""
        west, south, east, north = self.box
        _, low, _, high = transform_bounds(MERCATOR, "EPSG:4326", 0, south, 0, north)
        return (low, west / METRES_PER_DEGREE), (high, east / METRES_PER_DEGREE)

    def window(self, box: Box) -> tuple[slice, slice]:
        """Rows and columns that a box touches."""
        wide, tall = self.pixel
        left, right = ((x - self.box[0]) / wide for x in (box[0], box[2]))
        top, bottom = ((self.box[3] - y) / tall for y in (box[3], box[1]))
        rows = slice(max(0, int(top) - 1), min(self.height, int(bottom) + 2))
        return rows, slice(max(0, int(left) - 1), min(self.width, int(right) + 2))


def _footprint(source: Source) -> _Footprint:
    if isinstance(source, Raster):
        height, width = np.shape(source.array)[-2:]
        crs, transform, place = source.crs, source.transform, source.place
        name = "the array"
    else:
        with open_raster(source) as raster:
            height, width, crs = raster.height, raster.width, raster.crs
            transform, place, name = raster.transform, "", raster.name
    crs = CRS.from_user_input(crs) if crs else None
    if not placed(crs):
        raise ValueError(
            f"{name} has {crs or 'no coordinate system'}, so it has no place on a "
            "map. Pass gk.Raster(array, transform, crs), or show it with "
            "gk.plots.show_chip."
        )
    degrees = transform_bounds(
        crs, "EPSG:4326", *array_bounds(height, width, transform), densify_pts=21
    )
    if not (-85 < degrees[1] < degrees[3] < 85):
        raise ValueError(
            f"{name} reaches latitude {degrees[1]:.1f} to {degrees[3]:.1f}; a web map "
            "ends at 85 degrees. Check transform and crs, or crop it."
        )
    west, south, east, north = degrees
    east += 360 * (east < west)  # across 180 degrees
    _, low, _, high = transform_bounds("EPSG:4326", MERCATOR, 0, south, 0, north)
    box = (west * METRES_PER_DEGREE, low, east * METRES_PER_DEGREE, high)
    pixel = max((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    return _Footprint(box, pixel, place)


def _grids(footprints: Sequence[_Footprint], max_side: int) -> list[_Grid]:
    """One grid per group of footprints that touch, or nearly do."""
    groups: list[list[_Footprint]] = []
    for one in dict.fromkeys(footprints):
        near = [g for g in groups if any(_near(one.box, other.box) for other in g)]
        groups = [g for g in groups if g not in near]
        groups.append([one, *(member for g in near for member in g)])
    names = [", ".join(sorted({one.place for one in g} - {""})) for g in groups]
    grids = []
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        boxes = np.array([one.box for one in group])
        box: Box = (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0))
        pixel = min(one.pixel for one in group)
        side = max(box[2] - box[0], box[3] - box[1]) / pixel
        thinned = max(1.0, side / max_side)
        label = name or "place"
        if names.count(name) > 1:
            label += f" {names[:number].count(name) + 1}"
        if thinned > 1:
            print(
                f"map: {label} is {side:.0f} pixels wide or high and is drawn with "
                f"{max_side}; the files keep every pixel."
            )
        width = max(1, round((box[2] - box[0]) / pixel / thinned))
        height = max(1, round((box[3] - box[1]) / pixel / thinned))
        grids.append(_Grid(label, box, width, height))
    return sorted(grids, key=lambda grid: grid.name)


def _near(a: Box, b: Box) -> bool:
    """Whether the gap between two boxes is less than the smaller one's side."""
    reach = min(a[2] - a[0], b[2] - b[0])
    return (
        max(a[0], b[0]) - min(a[2], b[2]) < reach
        and max(a[1], b[1]) - min(a[3], b[3]) < reach
    )


# --- what: numbers on the grid, then colours ------------------------------------------


def _draw_layer(layer: MapLayer, grids: Sequence[_Grid]) -> DrawnLayer:
    placed = _sources_by_grid(sources_of(layer.source), grids)
    smooth = Resampling.bilinear if layer.kind == "image" else Resampling.nearest
    canvases = [_canvas(sources, grid, layer, smooth) for grid, sources in placed]
    if layer.kind == "image":
        painted, legend = _paint_images(canvases), None
    elif layer.kind == "values":
        painted, legend = _paint_values(layer, [canvas[0] for canvas in canvases])
    else:
        numbers = [canvas[0] for canvas in canvases]
        painted, legend = _paint_classes(layer, numbers, [grid for grid, _ in placed])
    pictures = tuple(
        Picture(_png(rgba), grid.degrees())
        for (grid, _), rgba in zip(placed, painted, strict=True)
    )
    return DrawnLayer(
        layer.name, pictures, legend, layer.visible, layer.opacity, layer.kind
    )


def _sources_by_grid(
    sources: Sequence[Source], grids: Sequence[_Grid]
) -> list[tuple[_Grid, list[Source]]]:
    """The grids that hold the centres of sources, each with these sources."""
    boxes = [_footprint(source).box for source in sources]
    middles = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
    found = []
    for grid in grids:
        pairs = zip(sources, middles, strict=True)
        inside = [source for source, middle in pairs if grid.holds(*middle)]
        if inside:
            found.append((grid, inside))
    return found


def _paint_images(canvases: Sequence[np.ndarray]) -> list[np.ndarray]:
    limits = stretch_limits(canvases)
    return [
        _rgba(stretch(canvas, limits), np.isfinite(canvas).all(axis=0))
        for canvas in canvases
    ]


def _paint_values(
    layer: MapLayer, canvases: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], Legend]:
    low, high = layer.limits or stretch_limits([c[None] for c in canvases])[:, 0]
    ramp = ramp_colours()
    span = max(high - low, 1e-12)
    painted = []
    for canvas in canvases:
        share = np.clip(np.nan_to_num((canvas - low) / span), 0, 1)
        step = np.minimum(share * len(ramp), len(ramp) - 1).astype(int)
        painted.append(_rgba(ramp[step] / 255, np.isfinite(canvas)))
    colours = [f"#{bytes(step).hex()}" for step in ramp[::51]]
    ends = [f"{low:.3g} {layer.unit}".strip(), *[""] * 4, f"{high:.3g} {layer.unit}"]
    entries = tuple(zip(colours, ends, strict=True))
    return painted, Legend(entries, (float(low), float(high)), layer.unit)


def ramp_colours() -> np.ndarray:
    """The 256 colours of viridis, (256, 3) uint8; like ones are neighbours."""
    from matplotlib import colormaps

    return np.round(255 * colormaps["viridis"](np.arange(256))[:, :3]).astype("u1")


def _paint_classes(
    layer: MapLayer, canvases: Sequence[np.ndarray], grids: Sequence[_Grid]
) -> tuple[list[np.ndarray], Legend]:
    classes, colours = classes_of(layer)
    _check_values(layer.name, canvases, classes)
    if layer.kind == "errors":
        assert layer.truth is not None
        truths = dict(_sources_by_grid(sources_of(layer.truth), grids))
        references = [_canvas(truths.get(grid, []), grid, layer)[0] for grid in grids]
        _check_values(layer.name, references, classes)
        canvases, classes, colours = _errors(canvases, references, classes)
    table = rgb_of(colours) / 255
    painted = []
    for canvas in canvases:
        known = np.isfinite(canvas)
        picked = table[np.where(known, canvas, 0).astype(int)]  # (h, w, 3)
        painted.append(_rgba(picked, known))
    return painted, Legend(tuple(zip(colours, classes, strict=True)))


def _errors(
    guesses: Sequence[np.ndarray], truths: Sequence[np.ndarray], classes: Sequence[str]
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Canvases of errors (NaN where right or unknown), their names and colours."""
    two = len(classes) == 2
    errors = []
    for guess, truth in zip(guesses, truths, strict=True):
        wrong = np.isfinite(guess) & np.isfinite(truth) & (guess != truth)
        kind = np.where(truth == 1, 0.0, 1.0) if two else 0.0
        errors.append(np.where(wrong, kind, np.nan))
    if not two:
        return errors, ["wrong"], [MISSED]
    names = [f"missed {classes[1]}", f"false {classes[1]}"]
    return errors, names, [MISSED, FALSE_ALARM]


def _check_values(
    name: str, canvases: Sequence[np.ndarray], classes: Sequence[str]
) -> None:
    for canvas in canvases:
        strange = np.unique(canvas[np.isfinite(canvas)])
        strange = strange[(strange < 0) | (strange >= len(classes)) | (strange % 1 > 0)]
        if strange.size:
            raise ValueError(
                f"Layer {name!r} holds {strange[:5].tolist()}, but its {len(classes)} "
                f"classes are numbered 0 to {len(classes) - 1}. Pass nodata= for the "
                "value that means 'not labelled', or all classes."
            )


def _canvas(
    sources: Sequence[Source],
    grid: _Grid,
    layer: MapLayer,
    resampling: Resampling = Resampling.nearest,
) -> np.ndarray:
    """A layer on the grid of a place: (C, height, width) float32, NaN where empty.

    C is 3 for images.
    """
    canvas: np.ndarray | None = None
    for source in sources:
        rows, columns = grid.window(_footprint(source).box)
        piece = _warp(
            source,
            layer,
            grid.transform(rows.start, columns.start),
            (rows.stop - rows.start, columns.stop - columns.start),
            resampling,
        )
        if canvas is None:
            canvas = np.full((len(piece), grid.height, grid.width), np.nan, np.float32)
        place = canvas[:, rows, columns]
        known = np.isfinite(piece).all(axis=0)
        place[:, known] = piece[:, known]
    if canvas is None:
        raise ValueError(
            f"Layer {layer.name!r}: its truth does not reach {grid.name!r}. Pass the "
            "truth of the same chips."
        )
    return canvas


def _warp(
    source: Source,
    layer: MapLayer,
    transform: Affine,
    shape: tuple[int, int],
    resampling: Resampling,
) -> np.ndarray:
    """One source on a piece of the grid: (C, *shape) float32 with NaN."""
    nodata = layer.nodata
    if nodata is None and layer.kind in ("classes", "errors"):
        nodata = 255
    if isinstance(source, Raster):
        array = source.stack
        if layer.kind == "image":
            array = array[_shown(layer, layer.bands, len(array))]
        array = array.astype(np.float32)
        if nodata is not None:
            array[array == nodata] = np.nan
        piece = np.full((len(array), *shape), np.nan, np.float32)
        reproject(
            array, piece, src_transform=source.transform, src_crs=source.crs,
            dst_transform=transform, dst_crs=MERCATOR, resampling=resampling,
            src_nodata=np.nan, dst_nodata=np.nan,
        )  # fmt: skip
        return piece
    with open_raster(source) as raster:
        indexes = [1]
        if layer.kind == "image":
            bands = layer.bands or [name or "" for name in raster.descriptions]
            indexes = [i + 1 for i in _shown(layer, bands, raster.count)]
        height, width = shape
        alpha = ColorInterp.alpha in raster.colorinterp
        with_mask = raster.nodata is None and not alpha
        with WarpedVRT(
            raster, crs=MERCATOR, transform=transform, height=height, width=width,
            resampling=resampling, add_alpha=with_mask,
        ) as warped:  # fmt: skip
            piece = warped.read(indexes).astype(np.float32)
            # GDAL takes an added alpha band for the mask in a few data types only.
            known = warped.read(warped.count) if with_mask else warped.dataset_mask()
            known = known > 0
    piece[:, ~known] = np.nan
    if nodata is not None:
        piece[piece == nodata] = np.nan
    return piece


def _shown(layer: MapLayer, bands: Any, count: int) -> list[int]:
    """Positions of the three bands that an image layer shows."""
    if bands is None or not any(bands):
        raise ValueError(
            f"Layer {layer.name!r} does not say which band is which. Pass bands=[...], "
            f"the names of its {count} bands in their order."
        )
    return picture_bands(bands, layer.show)


# --- encoding -------------------------------------------------------------------------


def _rgba(colour: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(h, w, 3) from 0 to 1 and (h, w) bool -> (h, w, 4) uint8."""
    alpha = known.astype(np.float32)[..., None]
    return np.round(np.concatenate([colour * alpha, alpha], axis=2) * 255).astype("u1")


def _png(rgba: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return png_url(buffer.getvalue())
