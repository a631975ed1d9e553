"""The map as a widget: ipyleaflet for the pictures, core ipywidgets for the controls.

All text on it comes from data and is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from geopeft_kit.maps.layers import MapLayer
from geopeft_kit.maps.overlays import Drawing, DrawnLayer
from geopeft_kit.maps.page import legends, markup
from geopeft_kit.maps.pixel_values import Reading, pixel_html, place_text

if TYPE_CHECKING:
    import ipyleaflet
    import ipywidgets

VIEW = "application/vnd.jupyter.widget-view+json"
PANES = 190  # one per layer; a map cannot get more later
ROW = {"flex": "none", "width": "auto"}


class Scene(Protocol):
    """What the widget shows, for instance a `SceneMap`."""

    drawing: Drawing
    height: int
    swipe: tuple[int, int] | None
    basemap: dict[str, Any] | None
    tools: bool
    on_box: Callable[[Any], Sequence[MapLayer]] | None

    @property
    def map(self) -> ipyleaflet.Map:
        """The map alone, made once."""

    def add(self, layers: Sequence[MapLayer]) -> None:
        """Put more layers on top."""

    def move(self, name: str, steps: int) -> None:
        """Move a layer up, or down."""

    def remove(self, name: str) -> None:
        """Take a layer away."""

    def pixel(self, lon: float, lat: float) -> list[Reading]:
        """What each layer holds at a place."""


def leaflet_map(scene: Scene) -> ipyleaflet.Map:
    """The map of a scene: a pane per layer, scale bar, north arrow."""
    import ipyleaflet
    import ipywidgets

    tiles = []
    if scene.basemap:
        tiles.append(ipyleaflet.TileLayer(**scene.basemap, base=True))
    elif scene.tools:  # leafmap needs a base layer; one without a URL fetches nothing
        tiles.append(ipyleaflet.TileLayer(url="", name="no basemap", base=True))
    bounds = scene.drawing.places[0][1]
    settings = {
        # An empty list, so that no default basemap is fetched.
        "layers": tuple(tiles),
        "panes": {f"layer-{n}": {"zIndex": 401 + n} for n in range(PANES)},
        "scroll_wheel_zoom": True,
        "zoom_snap": 0.25,
        "max_zoom": 24,
        **view_of(bounds, scene.height),
    }
    if scene.tools:
        import leafmap

        settings["measure_control"] = True
        drawn = leafmap.Map(height=f"{scene.height}px", **settings)
    else:
        drawn = ipyleaflet.Map(**settings)
        drawn.add(ipyleaflet.ScaleControl(position="bottomleft"))
    drawn.layout.height = f"{scene.height}px"
    arrow = ipywidgets.HTML("<div style='line-height:1.1;padding:0 5px'>▲<br>N</div>")
    drawn.add(ipyleaflet.WidgetControl(widget=arrow, position="topleft"))
    drawn.add_class("gpk-map")
    return drawn


def view_of(bounds: tuple, height: int, width: float = 700) -> dict[str, Any]:
    """Centre and zoom that show ((south, west), (north, east)), degrees, as a whole."""
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


@dataclass
class LayerRow:
    """A layer's line in the side panel, and its pictures on the map."""

    box: Any
    switch: Any
    slider: Any
    overlays: list[Any]


class MapControls:
    """Places, layers, opacity, swipe and legend beside the map; the pixel below it."""

    def __init__(self, scene: Scene) -> None:
        import ipyleaflet
        import ipywidgets as widgets

        self.scene, self.map, self.on_box = scene, scene.map, scene.on_box
        self.rows: dict[str, LayerRow] = {}
        self.split, self.group = None, None
        self.swiped: list[str] = []
        self.busy, self.moved = True, 0.0
        self.choice = named(_narrow(widgets.Dropdown, description="go to"), "places")
        self.choice.observe(self._chosen, names="value")
        home = self._button("home", "show the whole place", self.go)
        self.places = widgets.HBox([self.choice, home], layout=ROW)
        self._make_layer_tools()
        self._make_swipe()
        self.legend = named(widgets.HTML(layout={"flex": "none"}), "legend")
        self.pixel = named(widgets.HTML(), "pixel")
        self.sides, self.mouse = (named(widgets.HTML(), n) for n in ("sides", "mouse"))
        for label, corner in ((self.sides, "topright"), (self.mouse, "bottomright")):
            control = ipyleaflet.WidgetControl(widget=label, position=corner)
            self.map.add(control)
        self.mark = ipyleaflet.CircleMarker(
            radius=6, color="#fff", fill=False, opacity=0.0, pane="markerPane"
        )
        self.side = widgets.VBox(layout=widgets.Layout(
            flex="1 0 250px", max_height=f"{scene.height}px", overflow="auto",
            padding="0 0 0 8px", min_width="0",
        ))  # fmt: skip
        self.map.layout.flex, self.map.layout.min_width = "1000 1 300px", "0"
        both = widgets.HBox([self.map, self.side], layout={"flex_flow": "row wrap"})
        self.box = named(widgets.VBox([both, self.pixel]), "scene")
        self.map.on_interaction(self._interacted)
        self.map.observe(self._first_view, names="pixel_bounds")
        if self.on_box is not None:
            self._add_box_tool()
        self.refresh()

    def refresh(self) -> None:
        """Show the scene's layers in their order, and what the switches say."""
        drawing = self.scene.drawing
        names = [layer.name for layer in drawing.layers]
        places = [name for name, _ in drawing.places]
        self.rows = {
            layer.name: self._row(layer, f"layer-{number}")
            for number, layer in enumerate(drawing.layers)
        }
        first = self.scene.swipe or (max(len(names) - 2, 0), len(names) - 1)
        self.busy = True  # new options reset a choice: that moves nothing
        for choice, number in zip(self.pair, first, strict=True):
            set_options(choice, _pairs(names), choice.value or names[number])
        set_options(self.chosen, _pairs(names), self.chosen.value)
        numbered = [(name, number) for number, name in enumerate(places)]
        set_options(self.choice, numbered, self.choice.value or 0)
        self.busy = False
        self.legend.value = legend_html(drawing)
        many = len(names) > 1
        self.side.children = [
            self.places,
            *[row.box for row in self.rows.values()][::-1],
            *([self.chosen, self.tools] if many else []),
            *([self.on, *self.pair] if many else []),
            self.legend,
        ]
        self._update(anew=True)

    def go(self, bounds: tuple | None = None) -> None:
        """Show a box ((south, west), (north, east)); by default the chosen place."""
        width = 700.0
        if self.map.pixel_bounds:
            (left, _), (right, _) = self.map.pixel_bounds
            width = right - left
        bounds = bounds or self.scene.drawing.places[self.choice.value][1]
        view = view_of(bounds, self.scene.height, width)
        self.map.center, self.map.zoom = view["center"], view["zoom"]

    def _chosen(self, _: Any) -> None:
        if not self.busy:
            self.go()

    def like(self, other: MapControls) -> None:
        """Take the view and the ticks of another map of the same place."""
        self.map.unobserve(self._first_view, names="pixel_bounds")
        self.map.center, self.map.zoom = other.map.center, other.map.zoom
        for name in self.rows.keys() & other.rows.keys():
            self.rows[name].switch.value = other.rows[name].switch.value
            self.rows[name].slider.value = other.rows[name].slider.value

    def _first_view(self, _: Any) -> None:
        """Fit the place once the browser has told the size of the map."""
        self.map.unobserve(self._first_view, names="pixel_bounds")
        self.go()

    def _interacted(self, **event: Any) -> None:
        """Coordinates under the mouse; the numbers of a pixel that is clicked."""
        if event.get("type") == "mousemove" and monotonic() - self.moved > 0.1:
            self.moved = monotonic()
            lat, lon = event["coordinates"]
            self.mouse.value = place_text(lon, lat, 5)
        if event.get("type") != "click":
            return
        lat, lon = event["coordinates"]
        self.mark.location, self.mark.opacity = (lat, lon), 1.0
        self.pixel.value = pixel_html(self.scene.pixel(lon, lat), lon, lat)

    def _add_box_tool(self) -> None:
        """A tool that draws boxes for the scene's `on_box`."""
        import ipyleaflet

        others = ("polyline", "polygon", "circlemarker", "marker", "circle")
        tool = ipyleaflet.DrawControl(
            **{shape: {} for shape in others},
            rectangle={"shapeOptions": {"color": "#fff", "fill": False}},
            edit=False,
            remove=False,
        )
        tool.on_draw(self._drawn)
        self.map.add(tool)

    def _drawn(self, tool: Any, action: str, geo_json: dict) -> None:
        if action != "created" or self.on_box is None:
            return
        corners = geo_json["geometry"]["coordinates"][0]
        lons, lats = [c[0] for c in corners], [c[1] for c in corners]
        box = (min(lons), min(lats), max(lons), max(lats))
        self.pixel.value = "<i>working on the box ...</i>"
        try:
            self.scene.add(self.on_box(box))
            self.pixel.value = "<i>the box is on the map</i>"
        except Exception as error:  # shown on the map, which still works
            self.pixel.value = f"<b>no layer:</b> {html.escape(str(error))}"
        tool.clear()

    def _row(self, layer: DrawnLayer, pane: str) -> LayerRow:
        """The row of a layer in a pane; a new one where layer or pane is new."""
        import ipywidgets as widgets

        old = self.rows.get(layer.name)
        if old is not None and old.overlays[0].pane == pane:
            return old
        switch = widgets.Checkbox(
            value=old.switch.value if old else layer.visible, description=layer.name,
            indent=False, layout={"width": "auto", "flex": "1 1 0", "min_width": "0"},
            **tooltip(widgets.Checkbox, layer.name),
        )  # fmt: skip
        slider = widgets.FloatSlider(
            value=old.slider.value if old else layer.opacity, min=0, max=1, step=0.01,
            readout=False, layout={"width": "80px", "flex": "none"},
            **tooltip(widgets.FloatSlider, f"opacity of {layer.name}"),
        )  # fmt: skip
        named(switch, "layer")
        named(slider, "opacity")
        overlays = _overlays(layer, pane)
        for overlay in overlays:
            # In the browser, so that it moves without asking Python.
            widgets.jslink((slider, "value"), (overlay, "opacity"))
        switch.observe(lambda _: self._update(), names="value")
        row = named(widgets.HBox([switch, slider], layout=ROW), "row")
        return LayerRow(row, switch, slider, overlays)

    def _button(self, text: str, title: str, action: Callable[[], Any]) -> Any:
        import ipywidgets as widgets

        button = widgets.Button(
            description=text, layout={"width": "auto"}, **tooltip(widgets.Button, title)
        )
        button.on_click(lambda _: action())
        return named(button, text)

    def _make_layer_tools(self) -> None:
        """One layer is chosen; buttons zoom to it, move it, and take it away."""
        import ipywidgets as widgets

        self.chosen = named(_narrow(widgets.Dropdown, description="layer"), "chosen")
        name, scene = (lambda: self.chosen.value), self.scene
        self.tools = widgets.HBox(
            [
                self._button("zoom", "zoom to the layer", self._zoom),
                self._button("up", "move up", lambda: scene.move(name(), 1)),
                self._button("down", "move down", lambda: scene.move(name(), -1)),
                self._button("remove", "take away", lambda: scene.remove(name())),
            ],
            layout=ROW,
        )

    def _zoom(self) -> None:
        found = [la for la in self.scene.drawing.layers if la.name == self.chosen.value]
        corners = np.array([picture.bounds for picture in found[0].pictures])
        self.go((corners[:, 0].min(axis=0), corners[:, 1].max(axis=0)))

    def _make_swipe(self) -> None:
        import ipywidgets as widgets

        self.on = _narrow(
            widgets.Checkbox, value=self.scene.swipe is not None,
            description="swipe between", indent=False,
        )  # fmt: skip
        named(self.on, "swipe")
        self.pair = [
            named(_narrow(widgets.Dropdown, description=side), side)
            for side in ("left", "right")
        ]
        for control in (self.on, *self.pair):
            control.observe(lambda _: self._update(), names="value")

    def _update(self, anew: bool = False) -> None:
        """Show what the switches say, and the two sides of a swipe."""
        if self.busy:
            return
        names, sides = list(self.rows), [choice.value for choice in self.pair]
        swiped = sides if self.on.value and sides[0] != sides[1] else []
        lowest = min((names.index(name) for name in swiped), default=len(names))
        for number, layer in enumerate(self.scene.drawing.layers):
            row = self.rows[layer.name]
            # Above the two sides only what is drawn on top of them is of use.
            covers = number > lowest and layer.kind in ("image", "classes")
            row.switch.disabled = layer.name in swiped or covers
            for overlay in row.overlays:
                on = row.switch.value and not covers
                overlay.visible = on or layer.name in swiped
        if anew or swiped != self.swiped:
            self._arrange(swiped)

    def _arrange(self, swiped: list[str]) -> None:
        """Put all pictures on the map anew, two layers of them under a divider.

        All others are in one group: whatever changes in `map.layers` while a divider
        is on the map would break the divider.
        """
        import ipyleaflet

        if self.split is not None:
            self.map.remove(self.split)
            self.split = None
        kept = [layer for layer in self.map.layers if layer is not self.group]
        shown = [
            o for n, row in self.rows.items() if n not in swiped for o in row.overlays
        ]
        self.group = ipyleaflet.LayerGroup(layers=(*shown, self.mark))
        self.map.layers = (*kept, self.group)
        self.swiped, self.sides.value = swiped, ""
        if swiped:
            left, right = (self.rows[name].overlays for name in swiped)
            self.split = ipyleaflet.SplitMapControl(left_layer=left, right_layer=right)
            self.map.add(self.split)
            self.sides.value = markup("sides", *swiped)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def _overlays(layer: DrawnLayer, pane: str) -> list[ipyleaflet.ImageOverlay]:
    import ipyleaflet

    return [
        ipyleaflet.ImageOverlay(
            url=picture.url, bounds=picture.bounds, pane=pane,
            name=layer.name, opacity=layer.opacity, visible=layer.visible,
        )
        for picture in layer.pictures
    ]  # fmt: skip


def named(widget: Any, name: str) -> Any:
    """A widget with the CSS class `gpk-` and a name."""
    widget.add_class(f"gpk-{name}")
    return widget


def set_options(choice: Any, options: Sequence[tuple[str, Any]], value: Any) -> None:
    """Options of a dropdown, and the chosen one; the first if there is no such value.

    Nothing is touched that does not change: each change is a message to the browser.
    """
    if list(choice.options) != list(options):
        choice.options = options
    values = [option[1] for option in options]
    choice.value = value if value in values else values[0]


def _narrow(kind: type, **settings: Any) -> Any:
    """A control that fits the side panel, with a short label."""
    return kind(
        **settings,
        layout={"width": "auto", "margin": "1px 0", "flex": "1 0 auto"},
        style={"description_width": "48px"},
    )


def legend_html(drawing: Drawing) -> str:
    """The legends as HTML, every name escaped."""
    return markup("legend", legends(drawing))


# --- ipywidgets 7, which Colab ships, and ipywidgets 8 --------------------------------


def view_bundle(widget: ipywidgets.Widget) -> dict[str, Any]:
    """The live widget as a MIME bundle; ipywidgets 7 has no method that returns it."""
    model = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {VIEW: model}


def show_bundle(bundle: dict[str, Any]) -> None:
    """Display a MIME bundle in a separate message.

    Only in such messages does Colab tell the front end where to load ipyleaflet from.
    """
    from IPython.display import display

    display(bundle, raw=True)


def tooltip(kind: type[ipywidgets.Widget], text: str) -> dict[str, str]:
    """The argument of a widget that sets its tooltip."""
    name = "tooltip" if "tooltip" in kind.class_trait_names() else "description_tooltip"
    return {name: text}
