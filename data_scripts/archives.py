"""The files of a data set: fetched, checked, and unpacked without harm.

An archive from the internet is untrusted: members with an absolute path, a `..` or a
link that leads out are refused, and nothing of such an archive stays on the disk.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from geopeft_kit.download import fetch

BROKEN = (
    zipfile.BadZipFile, tarfile.ReadError, tarfile.StreamError, zlib.error, EOFError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """One file of an upstream data set.

    Attributes:
        url: Where it is fetched from; "" where it has to be got by hand.
        name: Where it lies below the folder of the upstream files.
        md5: As its source publishes it, or None.
        sha256: As its source publishes it, or as computed from the real file.
        unpack: It is an archive, or the last part of one.
        after: Names of the earlier parts of the same archive.
    """

    url: str
    name: str
    md5: str | None = None
    sha256: str | None = None
    unpack: bool = False
    after: tuple[str, ...] = ()


def download(files: Iterable[File], folder: Path) -> Path:
    """Fetch files and unpack archives, each once.

    Args:
        files: A generator may read an earlier file before it names the next one.
        folder: Where they are kept, so that a second run fetches nothing.

    Returns:
        The folder.

    Raises:
        RuntimeError: A download failed, or a file has another checksum.
        ValueError: An archive is broken or points out of the folder.
    """
    for file in files:
        path = folder / file.name
        fetch(file.url, path, sha256=file.sha256, md5=file.md5)
        if file.unpack:
            unpack([*(folder / name for name in file.after), path], folder)
    return folder


def gather(files: Iterable[File], given: Path, folder: Path) -> Path:
    """Bring files that are on the disk already into one folder, unpacked.

    Args:
        files: As for `download`.
        given: Holds archives as they were downloaded; it is only read.
        folder: Where they are unpacked, and where the other files are copied.

    Returns:
        The folder; it does not exist where no file of the list was found.

    Raises:
        RuntimeError: A file has another checksum than its source publishes.
        ValueError: An archive is broken or points out of the folder.
    """
    for file in files:
        path = given / file.name
        if not path.is_file():
            continue
        _check(path, file)
        if file.unpack:
            unpack([*(given / name for name in file.after), path], folder)
        elif path != folder / file.name:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / file.name)
    return folder


def _check(path: Path, file: File) -> None:
    """Compare a user's own copy with the published checksum; it is left alone."""
    for name, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is None:
            continue
        with path.open("rb") as content:
            found = hashlib.file_digest(content, name).hexdigest()
        if found != expected:
            raise RuntimeError(
                f"{path} has {name.upper()} {found}, but its source publishes "
                f"{expected}. Download it again from {file.url or 'its source'}."
            )


def unpack(parts: Sequence[Path], folder: Path) -> Path:
    """Unpack an archive once; a second call does nothing.

    Args:
        parts: The archive, or the parts it was split into, in their order.
        folder: Where its members go. They arrive when all of them are unpacked.

    Returns:
        The folder.

    Raises:
        ValueError: No archive, cut short, or with a member that leads out.
        OSError: The disk is full.
    """
    archive = parts[-1]
    done = folder / f".{archive.name}.unpacked"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{archive.name}.part"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        staging.mkdir()
        print(f"Unpacking {archive.name}")
        (_unzip if zipfile.is_zipfile(archive) else _untar)(parts, staging)
        for path in sorted(p for p in staging.rglob("*") if not p.is_dir()):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        done.touch()
    except BROKEN as error:
        raise ValueError(
            f"{archive} is no readable archive ({error}). Remove it and run again."
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}; nothing of {archive.name} is left half-"
            "unpacked. Free some space or choose another --root, then run again. The "
            "folder was",
            str(folder),
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _refuse(archive: Path, name: str) -> None:
    raise ValueError(
        f"{archive} holds {name!r}, which points out of the folder. Nothing of it was "
        "kept; do not trust this file."
    )


def _leads_out(name: str) -> bool:
    """Whether a member's name is absolute or climbs, on any system."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    return any(p.is_absolute() or p.drive or ".." in p.parts for p in paths)


def _unzip(parts: Sequence[Path], folder: Path) -> None:
    with zipfile.ZipFile(parts[-1]) as file:
        for member in file.infolist():
            link = stat.S_ISLNK(member.external_attr >> 16)
            if link or _leads_out(member.filename):
                _refuse(parts[-1], member.filename)
        needed = sum(member.file_size for member in file.infolist())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"{parts[-1].name} unpacks to {needed / 1e6:.0f} MB, and {folder} has "
                f"{free / 1e6:.0f} MB free"
            )
        file.extractall(folder)


def _untar(parts: Sequence[Path], folder: Path) -> None:
    with _Joined(parts) as whole, tarfile.open(fileobj=whole, mode="r|*") as file:
        for member in file:
            # A data set needs no links, and a chain of them leads anywhere.
            if _leads_out(member.name) or member.issym() or member.islnk():
                _refuse(parts[-1], member.name)
            try:
                file.extract(member, folder, filter="data")
            except tarfile.FilterError:
                _refuse(parts[-1], member.name)


class _Joined:
    """Files read one after another, as if they were one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.left = list(paths)
        self.file: BinaryIO | None = None

    def read(self, size: int) -> bytes:
        while True:
            if self.file is None:
                if not self.left:
                    return b""
                self.file = self.left.pop(0).open("rb")
            if block := self.file.read(size):
                return block
            self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> _Joined:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
