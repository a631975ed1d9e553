"""Images, predictions and errors on an interactive map, live or as one HTML page."""

from geopeft_kit.maps.layers import MapLayer, Raster, chip_layers
from geopeft_kit.maps.scene_map import SceneMap, save_map, show_map

__all__ = ["MapLayer", "Raster", "SceneMap", "chip_layers", "save_map", "show_map"]
