"""The opener of rasters, under the path that this room imports."""

from geopeft_kit.raster_files import ALONE, UnreadableRaster, open_raster

__all__ = ["ALONE", "UnreadableRaster", "open_raster"]
