"""The user's polygons and points, read and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import geopandas as gpd

VECTORS = (".gpkg", ".shp", ".geojson", ".json", ".parquet", ".csv", ".fgb")


def is_vector(source: Any) -> bool:
    """Whether an argument stands for polygons or points.

    Args:
        source: Whatever was handed in as masks.

    Returns:
        True for a GeoDataFrame and for files with a vector format's ending.
    """
    if hasattr(source, "geometry") and hasattr(source, "crs"):
        return True
    single = isinstance(source, str | os.PathLike)
    return single and Path(source).suffix.lower() in VECTORS


def read_vector(
    source: str | os.PathLike[str] | gpd.GeoDataFrame, what: str
) -> gpd.GeoDataFrame:
    """Polygons or points, checked.

    Args:
        source: A GeoPackage, shapefile, GeoJSON or GeoParquet, a CSV with the columns
            lon and lat (degrees), or a GeoDataFrame.
        what: What they are, for messages.

    Returns:
        The features, with a CRS and a geometry in each row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not readable, empty, without a CRS, or a row has no
            geometry.
    """
    import geopandas as gpd

    if isinstance(source, gpd.GeoSeries):
        source = gpd.GeoDataFrame(geometry=source)
    if isinstance(source, gpd.GeoDataFrame):
        table, name = source, f"the {what}"
    else:
        name = os.fspath(source)
        table = _read_file(Path(name), what)
    if table.empty:
        raise ValueError(f"{name} has no features; give at least one of the {what}.")
    if table.crs is None:
        raise ValueError(
            f"{name} has no CRS, so where it lies is not known. Set the one that it "
            'was drawn in: geopandas.read_file(...).set_crs("EPSG:...").'
        )
    lacking = np.flatnonzero((table.geometry.isna() | table.geometry.is_empty).array)
    if len(lacking):
        raise ValueError(
            f"{name}: {len(lacking)} of {len(table)} rows have no geometry or an empty "
            f"one, the first is row {lacking[0]}. Remove them: "
            "table[~(table.geometry.isna() | table.is_empty)]."
        )
    return table.reset_index(drop=True)


def _read_file(path: Path, what: str) -> gpd.GeoDataFrame:
    import geopandas as gpd
    import pandas as pd
    from pyogrio.errors import DataSourceError

    from geopeft_kit.data.pairing import read_csv

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path} of {what}. Check the path.")
    if path.suffix.lower() == ".csv":
        table = read_csv(path)
        if not {"lon", "lat"} <= set(table):
            raise ValueError(
                f"{path} has the columns {', '.join(map(str, table))}; points need lon "
                "and lat, in degrees."
            )
        degrees = table[["lon", "lat"]].apply(pd.to_numeric, errors="coerce")
        bad = np.flatnonzero(
            degrees.isna().any(axis=1)
            | degrees.abs().gt({"lon": 180, "lat": 90}).any(axis=1)
        )
        if len(bad):
            raise ValueError(
                f"{path}: row {bad[0]} has no longitude from -180 to 180 and latitude "
                "from -90 to 90. Correct it, or check that they are not swapped."
            )
        places = gpd.points_from_xy(degrees["lon"], degrees["lat"], crs="EPSG:4326")
        return gpd.GeoDataFrame(table, geometry=places)
    read = gpd.read_parquet if path.suffix == ".parquet" else gpd.read_file
    try:
        table = read(path)
    except (DataSourceError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not readable as {what}: {error}. Pass a GeoPackage, shapefile, "
            "GeoJSON or GeoParquet."
        ) from error
    if not isinstance(table, gpd.GeoDataFrame):
        raise ValueError(f"{path} has no geometry, so it holds no {what}.")
    return table
