"""A small STAC API with its GeoTIFFs on 127.0.0.1; files answer to ranges only in part.

Notes every request, so that a test can tell what was read and how much of it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import shapely
from hub_server import running

GEOJSON = "application/geo+json"
CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/item-search",
]


@dataclass
class Catalogue:
    """Items and files of a server, and what was asked of it."""

    folder: Path
    items: list[dict[str, Any]] = field(default_factory=list)
    page: int = 2  # items per answer, so that clients have to turn pages
    searches: list[dict[str, Any]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def search(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A FeatureCollection of the items that fit, one page of it."""
        self.searches.append(asked)
        frame = shapely.box(*asked["bbox"])
        first, last = asked["datetime"].split("/")
        found = [
            item
            for item in self.items
            if item["collection"] in asked["collections"]
            and first[:10] <= item["properties"]["datetime"][:10] <= last[:10]
            and shapely.box(*item["bbox"]).intersects(frame)
        ]
        start = int(asked.get("token", 0))
        links = []
        if start + self.page < len(found):
            body = asked | {"token": start + self.page}
            address = {"href": f"{self.url}/search", "type": GEOJSON}
            links = [{"rel": "next", "method": "POST", "body": body, **address}]
        some = found[start : start + self.page]
        return {"type": "FeatureCollection", "features": some, "links": links}


class Handler(BaseHTTPRequestHandler):
    """Landing page, search, files."""

    catalogue: Catalogue
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", GEOJSON)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._json(self.catalogue.search(json.loads(body)))

    def do_GET(self) -> None:
        held = self.catalogue
        path = held.folder / self.path.lstrip("/").split("?")[0]
        if self.path.rstrip("/") in ("", "/stac"):
            address = {"href": f"{held.url}/search", "type": GEOJSON}
            links = [{"rel": "search", "method": m, **address} for m in ("GET", "POST")]
            links += [{"rel": r, "href": held.url} for r in ("self", "root")]
            landing = {"type": "Catalog", "id": "test", "stac_version": "1.0.0"}
            landing |= {"description": "test", "conformsTo": CONFORMS, "links": links}
            self._json(landing)
        elif path.is_file():
            self._file(path.read_bytes())
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self) -> None:
        path = self.catalogue.folder / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        size = path.stat().st_size if path.is_file() else 0
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _file(self, content: bytes) -> None:
        wanted = self.headers.get("Range")
        self.catalogue.ranges.append(wanted)
        start, stop = 0, len(content)
        if wanted:
            a, b = re.match(r"bytes=(\d*)-(\d*)", wanted).groups()
            start = int(a) if a else len(content) - int(b)
            stop = min(int(b) + 1, len(content)) if a and b else len(content)
        body = content[start:stop]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if wanted:
            end = f"bytes {start}-{stop - 1}/{len(content)}"
            self.send_header("Content-Range", end)
        self.end_headers()
        self.catalogue.sent += len(body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


@contextlib.contextmanager
def serve(catalogue: Catalogue) -> Iterator[Catalogue]:
    """Serve a catalogue and set its address."""
    with running(Handler, catalogue=catalogue) as catalogue.url:
        yield catalogue
