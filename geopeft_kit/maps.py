"""Interactive maps that need no tile server and no network.

`show_map` gives a `SceneMap`. In JupyterLab, Notebook, VS Code and Colab it appears as
a widget (ipyleaflet, with core ipywidgets as controls), and the notebook also carries
the same map as a stand-alone page, which is what an exported notebook shows.

Taught in notebooks 00 (a held-out region) and 09 (unseen regions).
"""

from __future__ import annotations

import html
import importlib.util
import math
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .map_page import frame, legends, page
from .overlays import Drawing, DrawnLayer, MapLayer, Raster, chip_layers, draw

if TYPE_CHECKING:
    import ipyleaflet
    import ipywidgets

__all__ = [
    "MapLayer",
    "Raster",
    "SceneMap",
    "chip_layers",
    "map_html",
    "save_map",
    "show_map",
]

EARTH = 40_075_016.686  # metres around the equator, the width of a web map at zoom 0


def show_map(
    layers: Sequence[MapLayer],
    swipe: tuple[str, str] | None = None,
    height: int = 520,
    title: str = "Map",
    basemap: str | None = None,
    tools: bool = False,
) -> SceneMap:
    """Draw layers on a map.

    Args:
        layers: From bottom to top; `chip_layers` makes them from chips.
        swipe: Names of two layers to compare from the start, left and right.
        height: Pixels.
        title: Title of the saved page.
        basemap: Name of a tile provider ("Esri.WorldImagery"), fetched from the web.
            By default nothing is fetched: the ground is plain grey.
        tools: Use leafmap's map, with its drawing and measuring tools. Importing
            leafmap takes some ten seconds.

    Returns:
        The map: shown when it is the last line of a cell, `.save("map.html")` writes
        it as a page, `.map` is the ipyleaflet map.

    Raises:
        ValueError: A layer has no place on Earth, or its values, classes, bands or
            names do not fit; the text says which.
    """
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
    return SceneMap(drawing, pair, height, title, _basemap(basemap), tools)


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
    """A map as a piece of HTML: an iframe that carries the whole page inside it.

    Args:
        layers: Layers, or a map made by `show_map`.
        height: Pixels; by default the map's own.
    """
    scene = layers if isinstance(layers, SceneMap) else show_map(layers)
    return frame(scene.page(), height or scene.height)


class SceneMap:
    """A drawn map: a widget, a page, and what a notebook needs to show either.

    Attributes:
        drawing: The layers as they are shown, and the places.
        map: The ipyleaflet (or leafmap) map, made when first asked for.
        widget: The map beside its controls.
    """

    def __init__(
        self,
        drawing: Drawing,
        swipe: tuple[int, int] | None = None,
        height: int = 520,
        title: str = "Map",
        basemap: dict[str, str] | None = None,
        tools: bool = False,
    ) -> None:
        self.drawing, self.swipe, self.height = drawing, swipe, height
        self.title, self.basemap, self.tools = title, basemap, tools

    def __repr__(self) -> str:
        names = ", ".join(layer.name for layer in self.drawing.layers)
        return f"SceneMap({names}; places: {len(self.drawing.places)})"

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
        handle, part = tempfile.mkstemp(suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.page())
            os.chmod(part, 0o644)  # a temporary file starts out private
            os.replace(part, path)
        except OSError as error:
            raise RuntimeError(
                f"{path} could not be written: {error}. Free some space or choose "
                "another folder."
            ) from error
        finally:
            Path(part).unlink(missing_ok=True)
        return path

    @cached_property
    def map(self) -> ipyleaflet.Map:
        """The map alone, without the controls beside it."""
        return _leaflet_map(self)

    @cached_property
    def widget(self) -> ipywidgets.Widget:
        """The map with its controls."""
        return _Controls(self).box

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        """Both forms: front ends prefer the widget, exported pages take the HTML."""
        bundle = {
            "text/plain": repr(self),
            "text/html": frame(self.page(), self.height),
        }
        if importlib.util.find_spec("ipyleaflet") is None:
            print("map: ipyleaflet is not installed, so this is the page, no widget.")
            return bundle
        view = "application/vnd.jupyter.widget-view+json"
        return bundle | {view: self.widget._repr_mimebundle_()[view]}


# --- the widget -----------------------------------------------------------------------


def _basemap(name: str | None) -> dict[str, str] | None:
    if name is None:
        return None
    import xyzservices

    provider = xyzservices.providers.query_name(name)
    attribution = provider.get("html_attribution", provider.get("attribution", ""))
    return {"url": provider.build_url(), "attribution": attribution}


def _leaflet_map(scene: SceneMap) -> ipyleaflet.Map:
    """The map of a scene: a pane per layer, scale bar, north arrow."""
    import ipyleaflet
    import ipywidgets

    ground = []
    if scene.basemap:
        ground.append(ipyleaflet.TileLayer(**scene.basemap, base=True))
    elif scene.tools:  # leafmap wants a ground; one without a URL asks for nothing
        ground.append(ipyleaflet.TileLayer(url="", name="no basemap", base=True))
    bounds = scene.drawing.places[0][1]
    settings = {
        # Without layers of its own a map asks for no tiles at all.
        "layers": tuple(ground),
        "panes": {
            f"layer-{n}": {"zIndex": 401 + n} for n in range(len(scene.drawing.layers))
        },
        "scroll_wheel_zoom": True,
        "zoom_snap": 0.25,
        "max_zoom": 24,
        **view_of(bounds, scene.height),
    }
    if scene.tools:
        import leafmap

        drawn = leafmap.Map(height=f"{scene.height}px", **settings)
    else:
        drawn = ipyleaflet.Map(**settings)
        drawn.add(ipyleaflet.ScaleControl(position="bottomleft"))
    drawn.layout.height = f"{scene.height}px"
    arrow = ipywidgets.HTML("<div style='line-height:1.1;padding:0 5px'>▲<br>N</div>")
    drawn.add(ipyleaflet.WidgetControl(widget=arrow, position="topleft"))
    drawn.add_class("gpk-map")
    return drawn


def view_of(bounds: tuple, height: int, width: int = 700) -> dict[str, Any]:
    """Centre and zoom that show a place whole.

    Args:
        bounds: ((south, west), (north, east)) in degrees.
        height: Pixels of the map.
        width: Pixels of the map, at least.
    """
    (south, west), (north, east) = bounds
    top, bottom = (
        math.asinh(math.tan(math.radians(latitude))) / (2 * math.pi)
        for latitude in (north, south)
    )
    tall, wide = max(top - bottom, 1e-9), max((east - west) / 360, 1e-9)
    zoom = math.log2(min((height - 20) / tall, (width - 20) / wide) / 256)
    middle = math.degrees(math.atan(math.sinh(math.pi * (top + bottom))))
    return {
        "center": (middle, (west + east) / 2),
        "zoom": min(22.0, math.floor(zoom * 4) / 4),
    }


class _Controls:
    """Core widgets beside the map: places, layers, opacity, swipe, legend."""

    def __init__(self, scene: SceneMap) -> None:
        import ipywidgets as widgets

        self.scene, self.map, self.split = scene, scene.map, None
        self.overlays = [
            _overlays(layer, number)
            for number, layer in enumerate(scene.drawing.layers)
        ]
        for group in self.overlays:
            for overlay in group:
                self.map.add(overlay)
        rows = [self._layer_row(n) for n in range(len(self.overlays))]
        parts = [*self._places(), *rows[::-1], *self._swipe()]
        parts.append(widgets.HTML(legend_html(scene.drawing)))
        parts[-1].add_class("gpk-legend")
        side = widgets.VBox(parts, layout=widgets.Layout(
            width="270px", max_height=f"{scene.height}px", overflow="auto",
            padding="0 0 0 8px", flex="none",
        ))  # fmt: skip
        self.map.layout.flex = "1 1 auto"
        self.box = widgets.HBox([self.map, side])
        self.box.add_class("gpk-scene")
        self._update()

    def _places(self) -> list[Any]:
        import ipywidgets as widgets

        places = self.scene.drawing.places
        if len(places) < 2:
            return []
        options = [(name, number) for number, (name, _) in enumerate(places)]
        choice = _narrow(widgets.Dropdown, options=options, description="go to")
        choice.add_class("gpk-places")

        def go(change: dict) -> None:
            view = view_of(places[change["new"]][1], self.scene.height)
            self.map.center, self.map.zoom = view["center"], view["zoom"]

        choice.observe(go, names="value")
        return [choice]

    def _layer_row(self, number: int) -> Any:
        import ipywidgets as widgets

        layer = self.scene.drawing.layers[number]
        switch = widgets.Checkbox(
            value=layer.visible, description=layer.name, tooltip=layer.name,
            indent=False, layout={"width": "160px"},
        )  # fmt: skip
        slider = widgets.FloatSlider(
            value=layer.opacity, min=0, max=1, step=0.01, readout=False,
            tooltip=f"opacity of {layer.name}", layout={"width": "80px"},
        )  # fmt: skip
        switch.add_class("gpk-layer")
        slider.add_class("gpk-opacity")
        for overlay in self.overlays[number]:
            # In the browser, so that it moves without asking Python.
            widgets.jslink((slider, "value"), (overlay, "opacity"))
        switch.observe(lambda _: self._update(), names="value")
        self.switches = [*getattr(self, "switches", []), switch]
        row = widgets.HBox([switch, slider], layout={"flex": "none"})
        row.add_class("gpk-row")
        return row

    def _swipe(self) -> list[Any]:
        import ipywidgets as widgets

        names = [layer.name for layer in self.scene.drawing.layers]
        chosen = self.scene.swipe or (max(len(names) - 2, 0), len(names) - 1)
        options = [(name, number) for number, name in enumerate(names)]
        self.on = _narrow(
            widgets.Checkbox, value=self.scene.swipe is not None,
            description="swipe between", indent=False,
        )  # fmt: skip
        self.pair = [
            _narrow(widgets.Dropdown, options=options, value=value, description=side)
            for value, side in zip(chosen, ("left", "right"), strict=True)
        ]
        self.on.add_class("gpk-swipe")
        for control in (self.on, *self.pair):
            control.observe(lambda _: self._update(), names="value")
        return [self.on, *self.pair] if len(names) > 1 else []

    def _update(self) -> None:
        """Show what the switches say; the two sides of a swipe belong to it."""
        import ipyleaflet

        sides = [choice.value for choice in self.pair]
        swiped = sides if self.on.value and sides[0] != sides[1] else []
        if self.split is not None:
            self.map.remove(self.split)
            self.split = None
        ground = [one for one in self.map.layers if one not in sum(self.overlays, [])]
        shown = []
        for number, group in enumerate(self.overlays):
            for overlay in group:
                overlay.visible = self.switches[number].value or number in swiped
            if number not in swiped:
                shown += group
        self.map.layers = tuple(ground + shown)
        if swiped:
            left, right = (self.overlays[number] for number in swiped)
            self.split = ipyleaflet.SplitMapControl(left_layer=left, right_layer=right)
            self.map.add(self.split)


def _overlays(layer: DrawnLayer, number: int) -> list[ipyleaflet.ImageOverlay]:
    import ipyleaflet

    return [
        ipyleaflet.ImageOverlay(
            url=picture.url, bounds=picture.bounds, pane=f"layer-{number}",
            name=layer.name, opacity=layer.opacity, visible=layer.visible,
        )
        for picture in layer.pictures
    ]  # fmt: skip


def _narrow(kind: type, **settings: Any) -> Any:
    """A control that fits the side panel, with a short label."""
    return kind(
        **settings,
        layout={"width": "240px", "margin": "1px 0", "flex": "none"},
        style={"description_width": "48px"},
    )


def legend_html(drawing: Drawing) -> str:
    """The legends as HTML, every name escaped."""
    parts = []
    for legend in legends(drawing):
        entries = legend["entries"]
        parts.append(f"<i>{html.escape(', '.join(legend['layers']))}</i>")
        if legend["ramp"]:
            colours = ",".join(colour for colour, _ in entries)
            parts.append(
                f"<div style='height:12px;background:linear-gradient(90deg,{colours})'>"
                f"</div>{html.escape(entries[0][1])} to {html.escape(entries[-1][1])}"
            )
            continue
        parts += [
            f"<div><span style='display:inline-block;width:14px;height:14px;"
            f"vertical-align:-2px;border:1px solid #0005;background:{colour}'></span> "
            f"{html.escape(text)}</div>"
            for colour, text in entries
        ]
    return "<div style='line-height:1.5'>" + "".join(parts) + "</div>"
