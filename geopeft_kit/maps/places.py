"""A box that was drawn on a map -> an image and a prediction as layers of the map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geopeft_kit.maps.layers import MapLayer
from geopeft_kit.open_raster import open_raster
from geopeft_kit.pictures import Colours
from geopeft_kit.scenes.fetch import fetch_scene, write_values
from geopeft_kit.scenes.inference import predict_scene

GRID = ("width", "height", "crs", "transform")


def predict_place(
    box: Sequence[float],
    model: Any,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    colours: Colours | None = None,
    name: str = "prediction",
    **options: Any,
) -> list[MapLayer]:
    """Predict a box, as layers for a map; for `show_map(..., on_box=...)`.

    Args:
        box: West, south, east, north in degrees.
        model: A trained segmentation model; `model.backbone.bands` are fetched.
        source: See `fetch_scene`.
        folder: Where the numbered scenes and predictions are written.
        classes: Class names; by default `model.classes`.
        colours: One per class; by default `model.colours`.
        name: Of the prediction's layer.
        **options: Of `fetch_scene`.

    Returns:
        The image, the prediction with its probabilities, and its confidence.

    Raises:
        FileNotFoundError: The folder does not exist; and all errors of `fetch_scene`.
        ValueError: Neither `classes` nor the model names the classes.
    """
    classes = getattr(model, "classes", None) if classes is None else classes
    if classes is None:
        raise ValueError(
            "the model has no class names: it was not trained by gk.fit on data with "
            "class names. Pass classes=[...]."
        )
    folder = Path(folder)
    number = len(list(folder.glob("place_*_scene.tif"))) + 1
    scene = fetch_scene(box, folder / f"place_{number:02d}_scene.tif", source,
                        bands=model.backbone.bands, **options)  # fmt: skip
    target = folder / f"place_{number:02d}.tif"
    predict_scene(model, scene, target, scale=1.0, classes=classes, colours=colours,
                  probabilities=True, progress=False)  # fmt: skip
    probabilities = target.with_name(f"{target.stem}_probabilities.tif")
    confidence = target.with_name(f"{target.stem}_confidence.tif")
    with open_raster(probabilities) as raster:
        highest = np.nanmax(raster.read(), axis=0, initial=0.0)[None]
        highest[highest == 0] = np.nan
        grid = {key: raster.profile[key] for key in GRID}
    write_values(confidence, highest, [], grid)
    label = f"{name} of box {number}"
    return [
        MapLayer(f"image of box {number}", scene, bands=model.backbone.bands),
        MapLayer(label, target, "classes", classes=classes, colours=colours,
                 probabilities=probabilities),
        MapLayer(f"confidence of {label}", confidence, "values", visible=False,
                 limits=(1 / len(classes), 1.0)),
    ]  # fmt: skip
