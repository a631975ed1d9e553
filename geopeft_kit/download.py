"""Download one file, once, and know that it is the right one.

A download shows its progress, resumes after an interruption, is checked against a
SHA-256, and appears under its name only when it is complete. If several processes ask
for the same file, one fetches it and the others wait.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .files import hash_of, whole_file
from .progress import progress_bar

ATTEMPTS = 5
TIMEOUT_S = 30.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
_BLOCK = 1 << 20
_BUSY = (429, 500, 502, 503, 504)
_BY_HAND = "fetch the file by hand and use that (for a backbone: weights=<local path>)"


def cache_folder() -> Path:
    """Where downloads are kept: GEOPEFT_CACHE, else ``~/.cache/geopeft_kit``."""
    folder = os.environ.get("GEOPEFT_CACHE")
    return Path(folder or "~/.cache/geopeft_kit").expanduser()


def hub_url(repo: str, file: str, revision: str = "main") -> str:
    """Address of a file on the Hugging Face hub, or on the mirror in HF_ENDPOINT."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/{repo}/resolve/{revision}/{file}"


def fetch(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    progress: bool = True,
    md5: str | None = None,
) -> Path:
    """Return a local file, downloading it if it does not exist yet.

    The checksum of a file without a known one is recorded at its first download, next
    to it as ``<name>.sha256``; later calls compare with that.

    Args:
        url: http or https address.
        path: of the local file.
        sha256: expected checksum, 64 hexadecimal digits, or None.
        progress: print the size and show a bar.
        md5: expected MD5, 32 hexadecimal digits, if the source publishes no SHA-256;
            it guards against accidents, not against malice.

    Returns:
        ``path``.

    Raises:
        ValueError: if the address is not http(s).
        FileNotFoundError: if the server has no such file.
        RuntimeError: with no network, a read-only or full disk, a checksum that
            differs (the file is deleted), or a server that keeps failing.
    """
    path = Path(path)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is not an http or https address")
    if path.is_file():  # also serves a cache that cannot be written to
        return _verify(path, sha256, progress, md5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # another process may have been faster
                _download(url, path, sha256, progress, md5)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            raise  # the server's 404, in our own words
        raise RuntimeError(_disk_message(path, error)) from error
    return _verify(path, sha256, progress, md5)


def _differs(path: Path, sha256: str | None, md5: str | None) -> str:
    """What is wrong with a file, in words; "" if it has the checksum asked for."""
    name, expected = ("SHA-256", sha256) if sha256 or not md5 else ("MD5", md5)
    if expected is None:
        return ""
    actual = hash_of(path, name.replace("-", "").lower())
    same = actual == expected.lower()
    return "" if same else f"{name} is {actual}, expected {expected}"


def _verify(path: Path, sha256: str | None, progress: bool, md5: str | None) -> Path:
    """Compare with the known checksum, or record one; delete what differs."""
    sidecar = path.with_name(f"{path.name}.sha256")
    known = sha256 or md5
    if not known and sidecar.is_file():
        sha256 = sidecar.read_text().split()[0]
    if wrong := _differs(path, sha256, md5):
        path.unlink()
        raise RuntimeError(
            f"{path.name}: {wrong}. The file was deleted ({path}); download it again, "
            "and if it differs again, do not trust its source"
        )
    if not known and not sidecar.is_file() and os.access(path.parent, os.W_OK):
        actual = hash_of(path)
        _write_text(sidecar, f"{actual}  {path.name}\n")
        if progress:
            print(
                f"No checksum is published for {path.name}; recorded SHA-256 {actual} "
                f"in {sidecar}. Later loads compare with it."
            )
    return path


def _write_text(path: Path, text: str) -> None:
    """Write a small file in one step."""
    with whole_file(path) as part:
        part.write_text(text)


class _Cut(Exception):
    """The connection ended early, or the server is busy; worth another try."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class _Part:
    """An incomplete download and the version (ETag or Last-Modified) of its bytes.

    With it a server can refuse to continue a file that has changed; without one the
    download starts again.
    """

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def resume_from(self, url: str) -> tuple[int, str]:
        """Bytes on disk and their validator; (0, "") if they cannot be continued."""
        try:
            note = json.loads(self.note.read_text())
            size = self.path.stat().st_size
        except (FileNotFoundError, json.JSONDecodeError):
            return 0, ""
        if note.get("url") != url or not note.get("validator"):
            return 0, ""
        return size, note["validator"]

    def remember(self, url: str, headers: http.client.HTTPMessage) -> None:
        """Note which version of the file the bytes to come belong to."""
        tag = headers.get("ETag", "")
        # A weak tag does not promise equal bytes.
        strong = tag if tag and not tag.startswith("W/") else ""
        validator = strong or headers.get("Last-Modified", "")
        _write_text(self.note, json.dumps({"url": url, "validator": validator}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _download(
    url: str, path: Path, sha256: str | None, progress: bool, md5: str | None
) -> None:
    """Fetch into ``<name>.part`` with retries, check, then rename."""
    part = _Part(path.with_name(f"{path.name}.part"))
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            _transfer(url, part, progress)
            break
        except _Cut as cut:
            reason = str(cut)
            pause = cut.pause or FIRST_PAUSE_S * 2**attempt
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(pause, LONGEST_PAUSE_S))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                part.discard()
            raise
    else:
        size = part.path.stat().st_size if part.path.exists() else 0
        raise RuntimeError(
            f"{url} could not be downloaded in {ATTEMPTS} tries ({reason}). "
            f"{size:,} bytes are kept: call again later to continue from there, or "
            f"{_BY_HAND}"
        )
    if wrong := _differs(part.path, sha256, md5):
        part.discard()
        raise RuntimeError(
            f"{url}: {wrong}. The file was deleted; try once more, and if it differs "
            "again, do not trust its source"
        )
    os.replace(part.path, path)
    part.discard()


def _transfer(url: str, part: _Part, progress: bool) -> None:
    """One attempt; raises `_Cut` where another may succeed."""
    start, validator = part.resume_from(url)
    headers = {"User-Agent": "geopeft_kit", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _open(url, headers, part) as answer:
        if answer.status == 206:
            given = answer.headers.get("Content-Range", "")
            if not given.startswith(f"bytes {start}-"):
                part.discard()
                raise _Cut(f"the server continued at the wrong place: {given!r}")
        else:
            start = 0
            part.discard()
            part.remember(url, answer.headers)
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        _check_answer(url, part.path, answer.headers, total, start)
        if progress:
            whole = f"{total / 1e6:,.1f} MB" if total else "size not given"
            done = f", {start / 1e6:,.1f} MB on disk" if start else ""
            print(f"Downloading {url} ({whole}{done})")
        with (
            open(part.path, "ab" if start else "wb") as file,
            progress_bar(
                shown=progress, total=total, initial=start, unit="B", unit_scale=True
            ) as bar,
        ):
            while block := _read(answer):
                file.write(block)
                bar.update(len(block))
    size = part.path.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.discard()
        raise _Cut(f"the connection ended after {size:,} of {total:,} bytes")


def _open(url: str, headers: dict[str, str], part: _Part) -> http.client.HTTPResponse:
    """Send the request; answers that are not the file become errors."""
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.discard()
            raise _Cut("the part on disk did not fit the server's file") from None
        if error.code in _BUSY:
            wait = error.headers.get("Retry-After", "")
            pause = float(wait) if wait.isdigit() else None
            raise _Cut(f"the server answered {error.code}", pause) from None
        if error.code in (404, 410):
            raise FileNotFoundError(
                f"{url} does not exist (the server answered {error.code}): it may have "
                f"been moved or renamed. Look at its page, or {_BY_HAND}"
            ) from None
        raise RuntimeError(
            f"{url} was refused (the server answered {error.code} {error.reason}). If "
            f"it needs a login, {_BY_HAND}"
        ) from None
    except urllib.error.URLError as error:
        raise RuntimeError(
            f"No connection to {url} ({error.reason}): go online once, or {_BY_HAND}"
        ) from None
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise _Cut(f"the connection failed: {error or type(error).__name__}") from error


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_BLOCK)
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise _Cut(f"the connection broke: {error or type(error).__name__}") from error


def _check_answer(
    url: str,
    path: Path,
    headers: http.client.HTTPMessage,
    total: int | None,
    start: int,
) -> None:
    """Refuse a web page in place of a file, and a file that the disk cannot hold."""
    if headers.get_content_type() == "text/html" and not url.endswith(".html"):
        raise RuntimeError(
            f"{url} gave a web page instead of a file: it may need a login; {_BY_HAND}"
        )
    free = shutil.disk_usage(path.parent).free
    if total is not None and total - start > free:
        raise RuntimeError(
            f"{url} needs {total - start:,} bytes and {path.parent} has {free:,} free. "
            "Make room, or set GEOPEFT_CACHE to a folder on a larger disk"
        )


def _disk_message(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {path} could not be written and its part was removed. "
            "Make room, or set GEOPEFT_CACHE to a folder on a larger disk"
        )
    return (
        f"{path} cannot be written ({error.strerror or error}): set GEOPEFT_CACHE to a "
        "folder that you may write to"
    )
