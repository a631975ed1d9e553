"""A small web server that behaves like a model hub, and misbehaves on request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Site:
    """What the server does, and what it saw."""

    content: bytes = CONTENT
    etag: str = '"one"'
    statuses: list[int] = field(default_factory=list)  # answers before the file
    cut_after: list[int] = field(default_factory=list)  # bytes sent before a cut
    content_type: str = "application/octet-stream"
    ranges: list[str | None] = field(default_factory=list)
    sent: int = 0
    path: str = "/owner/model/resolve/main/weights.bin"
    root: str = ""

    @property
    def url(self) -> str:
        """Address of the one file."""
        return self.root + self.path

    def find(self, path: str) -> bytes | None:
        """What lies at a path; None where nothing does."""
        return self.content if path == self.path else None


class Handler(BaseHTTPRequestHandler):
    """One file, with ranges, as a hub serves it."""

    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        site.ranges.append(self.headers.get("Range"))
        if site.statuses:
            self.send_response(site.statuses.pop(0))
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        content = site.find(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        wanted = self.headers.get("Range")
        end = len(content) - 1
        if wanted and self.headers.get("If-Range", site.etag) == site.etag:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last or end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start : end + 1]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", site.content_type)
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        stop = site.cut_after.pop(0) if site.cut_after else len(body)
        # counted first: the client may be done before this thread runs again
        site.sent += min(stop, len(body))
        self.wfile.write(body[:stop])


@contextlib.contextmanager
def running(handler: type, **attributes: object) -> Iterator[str]:
    """Serve with a handler class on a free port of 127.0.0.1; yields the address."""
    own = type("Handler", (handler,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serve a site and set its address."""
    with running(Handler, site=site) as site.root:
        yield site
