"""The map as a widget: ipyleaflet for the pictures, core ipywidgets for the controls.

All text on it comes from data and is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from geopeft_kit.maps.layers import MapLayer
from geopeft_kit.maps.overlays import Drawing, DrawnLayer
from geopeft_kit.maps.page import legends, markup
from geopeft_kit.maps.pixel_values import Reading, pixel_html

if TYPE_CHECKING:
    import ipyleaflet
    import ipywidgets

VIEW = "application/vnd.jupyter.widget-view+json"
SPARE_PANES = 60  # for layers added later; a map cannot get more panes


class Scene(Protocol):
    """What the widget shows, for instance a `SceneMap`."""

    drawing: Drawing
    height: int
    swipe: tuple[int, int] | None
    basemap: dict[str, str] | None
    tools: bool
    on_box: Callable[[Any], Sequence[MapLayer]] | None

    @property
    def map(self) -> ipyleaflet.Map:
        """The map alone, made once."""

    def add(self, layers: Sequence[MapLayer]) -> None:
        """Put more layers on top."""

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
        "panes": {
            f"layer-{n}": {"zIndex": 401 + n}
            for n in range(len(scene.drawing.layers) + SPARE_PANES)
        },
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


def view_of(bounds: tuple, height: int, width: int = 700) -> dict[str, Any]:
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


class MapControls:
    """The side panel in core widgets: places, layers, opacity, swipe, legend, pixel."""

    def __init__(self, scene: Scene) -> None:
        import ipywidgets as widgets

        self.scene, self.map, self.split = scene, scene.map, None
        self.overlays: list[list[Any]] = []
        self.switches: list[Any] = []
        self.rows: list[Any] = []
        self.busy = True
        self.choice = named(_narrow(widgets.Dropdown, description="go to"), "places")
        self.choice.observe(self._go, names="value")
        self._make_swipe()
        self.legend = named(widgets.HTML(), "legend")
        self.pixel = named(widgets.HTML(), "pixel")
        self.side = widgets.VBox(layout=widgets.Layout(
            width="270px", max_height=f"{scene.height}px", overflow="auto",
            padding="0 0 0 8px", flex="none",
        ))  # fmt: skip
        self.map.layout.flex = "1 1 auto"
        self.box = named(widgets.HBox([self.map, self.side]), "scene")
        self.map.on_interaction(self._clicked)
        self.on_box = scene.on_box
        if self.on_box is not None:
            self._add_box_tool()
        self.refresh()

    def refresh(self) -> None:
        """Show layers that were added to the scene, and what the switches say."""
        drawing = self.scene.drawing
        for number in range(len(self.rows), len(drawing.layers)):
            self.overlays.append(_overlays(drawing.layers[number], number))
            self.rows.append(self._layer_row(number))
        names = [layer.name for layer in drawing.layers]
        places = [name for name, _ in drawing.places]
        first = self.scene.swipe or (max(len(names) - 2, 0), len(names) - 1)
        self.busy = True  # new options reset a choice: that moves nothing
        for choice, default in zip(self.pair, first, strict=True):
            _number(choice, names, default)
        _number(self.choice, places, 0)
        self.busy = False
        self.legend.value = legend_html(drawing)
        self.side.children = [
            *([self.choice] if len(places) > 1 else []),
            self.pixel,
            *self.rows[::-1],
            *([self.on, *self.pair] if len(names) > 1 else []),
            self.legend,
        ]
        self._update()

    def _go(self, change: dict) -> None:
        if self.busy:
            return
        bounds = self.scene.drawing.places[change["new"]][1]
        view = view_of(bounds, self.scene.height)
        self.map.center, self.map.zoom = view["center"], view["zoom"]

    def _clicked(self, **event: Any) -> None:
        """Show the numbers of the pixel that was clicked."""
        if event.get("type") != "click":
            return
        lat, lon = event["coordinates"]
        self.pixel.value = pixel_html(self.scene.pixel(lon, lat), lon, lat)

    def _add_box_tool(self) -> None:
        """A tool that draws boxes for the scene's `on_box`."""
        import ipyleaflet

        others = ("polyline", "polygon", "circlemarker", "marker", "circle")
        tool = ipyleaflet.DrawControl(
            **{shape: {} for shape in others},
            rectangle={"shapeOptions": {"color": "#000", "fill": False}},
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

    def _layer_row(self, number: int) -> Any:
        import ipywidgets as widgets

        layer = self.scene.drawing.layers[number]
        switch = widgets.Checkbox(
            value=layer.visible, description=layer.name, indent=False,
            layout={"width": "160px"}, **tooltip(widgets.Checkbox, layer.name),
        )  # fmt: skip
        slider = widgets.FloatSlider(
            value=layer.opacity, min=0, max=1, step=0.01, readout=False,
            layout={"width": "80px"},
            **tooltip(widgets.FloatSlider, f"opacity of {layer.name}"),
        )  # fmt: skip
        named(switch, "layer")
        named(slider, "opacity")
        for overlay in self.overlays[number]:
            # In the browser, so that it moves without asking Python.
            widgets.jslink((slider, "value"), (overlay, "opacity"))
        switch.observe(lambda _: self._update(), names="value")
        self.switches.append(switch)
        row = widgets.HBox([switch, slider], layout={"flex": "none"})
        return named(row, "row")

    def _make_swipe(self) -> None:
        import ipywidgets as widgets

        self.on = _narrow(
            widgets.Checkbox, value=self.scene.swipe is not None,
            description="swipe between", indent=False,
        )  # fmt: skip
        named(self.on, "swipe")
        self.pair = [
            _narrow(widgets.Dropdown, description=side) for side in ("left", "right")
        ]
        for control in (self.on, *self.pair):
            control.observe(lambda _: self._update(), names="value")

    def _update(self) -> None:
        """Show what the switches say, and the two sides of a swipe."""
        import ipyleaflet

        sides = [choice.value for choice in self.pair]
        if self.busy:
            return
        swiped = sides if self.on.value and sides[0] != sides[1] else []
        if self.split is not None:
            self.map.remove(self.split)
            self.split = None
        tiles = [one for one in self.map.layers if one not in sum(self.overlays, [])]
        shown = []
        for number, group in enumerate(self.overlays):
            # Layers above the two sides would hide the comparison.
            covers = bool(swiped) and number > min(swiped)
            on = self.switches[number].value and not covers
            for overlay in group:
                overlay.visible = on or number in swiped
            if number not in swiped:
                shown += group
        self.map.layers = tuple(tiles + shown)
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


def _number(choice: Any, names: list[str], default: int) -> None:
    """Offer names, whose values are their positions; the chosen one stays chosen."""
    value = default if choice.value is None else choice.value
    set_options(choice, [(name, number) for number, name in enumerate(names)], value)


def _narrow(kind: type, **settings: Any) -> Any:
    """A control that fits the side panel, with a short label."""
    return kind(
        **settings,
        layout={"width": "240px", "margin": "1px 0", "flex": "none"},
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
