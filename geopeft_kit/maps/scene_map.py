"""Interactive maps that need no tile server and no network.

A `SceneMap` appears as a widget (ipyleaflet, with core ipywidgets as controls) in
JupyterLab, Notebook, VS Code and Colab. The notebook also carries the same map as a
stand-alone page, which an exported notebook shows.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopeft_kit.files import whole_file
from geopeft_kit.maps.layers import MapLayer
from geopeft_kit.maps.overlays import Box, Drawing, draw
from geopeft_kit.maps.page import frame, page
from geopeft_kit.maps.pixel_values import Reading, read_pixel
from geopeft_kit.maps.widget import (
    PANES,
    MapControls,
    leaflet_map,
    show_bundle,
    view_bundle,
)

if TYPE_CHECKING:
    import ipyleaflet
    import ipywidgets

OnBox = Callable[[Box], Sequence[MapLayer]]


def show_map(
    layers: Sequence[MapLayer],
    swipe: tuple[str, str] | None = None,
    height: int = 520,
    title: str = "Map",
    basemap: str | None = None,
    tools: bool = False,
    on_box: OnBox | None = None,
) -> SceneMap:
    """Draw layers on a map.

    Args:
        layers: From bottom to top; `chip_layers` makes them from chips.
        swipe: Names of two layers to compare from the start, left and right.
        height: Pixels.
        title: Title of the saved page.
        basemap: Name of a tile provider ("Esri.WorldImagery"), fetched from the web.
            By default nothing is fetched and the background is dark.
        tools: Use leafmap's map, with its drawing and measuring tools (`pip install
            leafmap`). Importing leafmap takes some ten seconds.
        on_box: Called with (west, south, east, north) in degrees when a box is drawn
            on the widget; the layers that it returns are added to the map.

    Returns:
        The map, shown when it is the last line of a cell. `.save("map.html")` writes
        it as a page, `.map` is the ipyleaflet map, `.pixel(lon, lat)` the values that
        a click shows. A click on the page shows the class or the value on a ramp.

    Raises:
        ValueError: A layer is not georeferenced, or its values, classes, bands or
            names do not fit.
        ModuleNotFoundError: `tools=True`, and leafmap is not installed.
    """
    if tools and importlib.util.find_spec("leafmap") is None:
        raise ModuleNotFoundError(
            "tools=True draws leafmap's map, and leafmap is not installed. Run "
            "`pip install leafmap`, or leave tools out."
        )
    drawing = draw(layers)
    names = [layer.name for layer in drawing.layers]
    for name in swipe or ():
        if name not in names:
            raise ValueError(
                f"swipe names the layer {name!r}. Known: {', '.join(names)}."
            )
    if swipe is not None and (len(swipe) != 2 or swipe[0] == swipe[1]):
        raise ValueError(f"swipe={swipe} has to name two different layers.")
    pair = (names.index(swipe[0]), names.index(swipe[1])) if swipe else None
    tiles = _basemap(basemap)
    return SceneMap(drawing, pair, height, title, tiles, tools, layers, on_box)


def save_map(
    layers: Sequence[MapLayer] | SceneMap, path: str | os.PathLike[str]
) -> Path:
    """Write a map as one HTML file that needs neither server nor network.

    Args:
        layers: Layers, or a map made by `show_map`.
        path: The file.

    Returns:
        The path.
    """
    scene = layers if isinstance(layers, SceneMap) else show_map(layers)
    return scene.save(path)


def map_html(layers: Sequence[MapLayer] | SceneMap, height: int | None = None) -> str:
    """A map as an HTML iframe that contains the whole page."""
    scene = layers if isinstance(layers, SceneMap) else show_map(layers)
    return frame(scene.page(), height or scene.height)


class SceneMap:
    """A drawn map, as a widget and as a page.

    Attributes:
        drawing: The layers as they are shown, and the places.
        map: The ipyleaflet (or leafmap) map, without the controls.
        widget: The map with its controls.
    """

    def __init__(
        self,
        drawing: Drawing,
        swipe: tuple[int, int] | None = None,
        height: int = 520,
        title: str = "Map",
        basemap: dict[str, Any] | None = None,
        tools: bool = False,
        layers: Sequence[MapLayer] = (),
        on_box: OnBox | None = None,
    ) -> None:
        self.drawing, self.swipe, self.height = drawing, swipe, height
        self.title, self.basemap, self.tools = title, basemap, tools
        self.layers, self.on_box = list(layers), on_box
        self._controls: MapControls | None = None

    def __repr__(self) -> str:
        names = ", ".join(layer.name for layer in self.drawing.layers)
        return f"SceneMap({names}; places: {len(self.drawing.places)})"

    def add(self, layers: Sequence[MapLayer]) -> None:
        """Put more layers on top, also on a map that is already shown.

        Args:
            layers: From bottom to top; a repeated name gets a number.
        """
        taken = {layer.name for layer in self.layers}
        fresh = []
        for layer in layers:
            name = next(n for n in _numbered(layer.name) if n not in taken)
            taken.add(name)
            fresh.append(replace(layer, name=name))
        if len(taken) > PANES:
            raise ValueError(
                f"a map holds {PANES} layers; remove some before you add more."
            )
        more = draw(fresh)
        known = {name for name, _ in self.drawing.places}
        places = []
        for name, bounds in more.places:
            label = next(n for n in _numbered(name) if n not in known)
            known.add(label)
            places.append((label, bounds))
        self.layers += fresh
        self._show(self.drawing.layers + more.layers, (*self.drawing.places, *places))

    def remove(self, name: str) -> None:
        """Take a layer away, also from a map that is already shown.

        Raises:
            ValueError: There is no such layer, or it is the only one.
        """
        place = self._position(name)
        if len(self.layers) == 1:
            raise ValueError(f"{name!r} is the only layer of the map.")
        self._arrange([n for n in range(len(self.layers)) if n != place])

    def move(self, name: str, steps: int = 1) -> None:
        """Move a layer up by a number of layers; a negative number moves it down.

        Raises:
            ValueError: There is no such layer.
        """
        place = self._position(name)
        order = [n for n in range(len(self.layers)) if n != place]
        order.insert(max(0, place + steps), place)
        self._arrange(order)

    def _position(self, name: str) -> int:
        names = [layer.name for layer in self.layers]
        if name not in names:
            raise ValueError(f"no layer {name!r}. Known: {', '.join(names)}.")
        return names.index(name)

    def _arrange(self, order: Sequence[int]) -> None:
        """Keep these layers, in this order."""
        pair = [order.index(n) for n in self.swipe or () if n in order]
        self.swipe = (pair[0], pair[1]) if len(pair) == 2 else None
        self.layers = [self.layers[n] for n in order]
        drawn = tuple(self.drawing.layers[n] for n in order)
        self._show(drawn, self.drawing.places)

    def _show(self, layers: tuple, places: tuple) -> None:
        self.drawing = Drawing(layers, places)
        if self._controls is not None:
            self._controls.refresh()

    def go(self, bounds: tuple) -> None:
        """Show a box ((south, west), (north, east)), degrees, on the widget."""
        if self._controls is not None:
            self._controls.go(bounds)

    def like(self, other: SceneMap) -> None:
        """Take the view and the ticks of another widget's map."""
        if self._controls is not None and other._controls is not None:
            self._controls.like(other._controls)

    def pixel(self, lon: float, lat: float) -> list[Reading]:
        """The content of each layer at a place, see `read_pixel`."""
        return read_pixel(self.layers, lon, lat)

    def page(self) -> str:
        """The stand-alone page as text."""
        return page(self.drawing, self.title, self.swipe, self.basemap)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the stand-alone page; an existing file is replaced at the end."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"The folder {str(path.parent)!r} does not exist. Create it first."
            )
        try:
            with whole_file(path) as part:
                part.write_text(self.page(), encoding="utf-8")
        except OSError as error:
            raise RuntimeError(
                f"{path} could not be written: {error}. Free some space or choose "
                "another folder."
            ) from error
        return path

    @cached_property
    def map(self) -> ipyleaflet.Map:
        """The map alone, without its controls."""
        return leaflet_map(self)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        """The map with its controls."""
        self._controls = MapControls(self)
        return self._controls.box

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        """Both forms: front ends prefer the widget, exported pages take the HTML."""
        bundle = {
            "text/plain": repr(self),
            "text/html": frame(self.page(), self.height),
        }
        if importlib.util.find_spec("ipyleaflet") is None:
            print("map: ipyleaflet is not installed, so the page is shown.")
            return bundle
        return bundle | view_bundle(self.widget)

    def _ipython_display_(self) -> None:
        show_bundle(self._repr_mimebundle_())


def _numbered(name: str) -> Iterator[str]:
    """The name, then the name with 2, 3, ..."""
    yield name
    yield from (f"{name} {number}" for number in itertools.count(2))


def _basemap(name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    import xyzservices

    try:
        provider = xyzservices.providers.query_name(name)
    except ValueError as error:
        names = list(xyzservices.providers.flatten())
        near = difflib.get_close_matches(name, names, 5, 0.3)
        raise ValueError(
            f"basemap={name!r} is not known. Similar names: {', '.join(near)}. "
            "xyzservices.providers.flatten() lists them all."
        ) from error
    attribution = provider.get("html_attribution", provider.get("attribution", ""))
    # Beyond the provider's own zooms its last tiles are enlarged.
    return {"url": provider.build_url(), "attribution": attribution, "max_zoom": 24,
            "max_native_zoom": provider.get("max_zoom", 18)}  # fmt: skip
