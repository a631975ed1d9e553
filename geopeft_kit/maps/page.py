"""A map as one HTML page that needs nothing else: no server, no network.

Leaflet comes from the installed package `django-js-lib-leaflet` (Leaflet itself, BSD
licence, without Django) and is embedded, as all pictures are. The page's security
policy forbids every request. A click reads the colours of the pictures back: the class,
or a value to 1/128 of its ramp. Reflectance is not in the page.
"""

from __future__ import annotations

import html
import importlib.resources
import re
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader

from geopeft_kit.maps.overlays import Drawing, ramp_colours

GROUND = "#111111"  # where no layer has data; all class colours are seen on it
TEMPLATES = Environment(loader=PackageLoader("geopeft_kit.maps", "."), autoescape=True)
TEMPLATES.globals["ground"] = GROUND


def markup(name: str, *values: Any) -> str:
    """A piece of `widget.html` with these values, which are escaped."""
    return str(getattr(TEMPLATES.get_template("widget.html").module, name)(*values))


def leaflet_files() -> tuple[str, str]:
    """Script and style of Leaflet, from the installed package."""
    try:
        folder = importlib.resources.files("js_lib_leaflet")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "Leaflet is not installed, so a stand-alone map cannot be made. Run: "
            "pip install django-js-lib-leaflet"
        ) from error
    static = folder / "static" / "js_lib_leaflet"
    script = (static / "leaflet.js").read_text(encoding="utf-8")
    style = (static / "leaflet.css").read_text(encoding="utf-8")
    # Icons of controls that these pages lack; a source map for debuggers.
    style = re.sub(r"url\([^)]*\)", "none", style)
    return re.sub(r"//# sourceMappingURL=.*", "", script), style


def legends(drawing: Drawing) -> list[dict[str, Any]]:
    """Each distinct legend once, with the names of the layers that it explains."""
    found: dict[Any, list[str]] = {}
    for layer in drawing.layers:
        if layer.legend is not None:
            found.setdefault(layer.legend, []).append(layer.name)
    return [{**asdict(legend), "layers": names} for legend, names in found.items()]


def page(
    drawing: Drawing,
    title: str = "Map",
    swipe: tuple[int, int] | None = None,
    basemap: dict[str, Any] | None = None,
) -> str:
    """The whole page as text.

    `swipe` holds the numbers of two layers to compare at first, `basemap` "url" and
    "attribution" of tiles; None fetches nothing.
    """
    data = {
        "layers": [asdict(layer) for layer in drawing.layers],
        "places": [{"name": name, "bounds": b} for name, b in drawing.places],
        "legends": legends(drawing),
        "ramp": [f"#{bytes(colour).hex()}" for colour in ramp_colours()],
        "swipe": swipe,
        "basemap": basemap,
    }
    script, style = leaflet_files()
    images = "data: https:" if basemap else "data:"
    return TEMPLATES.get_template("page.html").render(
        policy="default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'unsafe-inline'; img-src {images}",
        title=title,
        leaflet_css=style,
        leaflet_js=script,
        data=data,
    )


def frame(text: str, height: int) -> str:
    """A page inside another one: an iframe that carries it and shares nothing."""
    return (
        f'<iframe srcdoc="{html.escape(text)}" sandbox="allow-scripts" title="map" '
        f'style="width: 100%; height: {int(height)}px; border: 1px solid #ccc">'
        "</iframe>"
    )
