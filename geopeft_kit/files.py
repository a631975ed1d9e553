"""Files and folders that are written whole or not at all, and what they hash to."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to; the file takes its place only when all went well.

    Args:
        target: The file; its folder has to be there.

    Yields:
        A temporary path beside it, with the same suffix.
    """
    handle, name = tempfile.mkstemp(
        prefix=".", suffix=f".part{target.suffix}", dir=target.parent
    )
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # a temporary file starts out private
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it takes the target's place only when all went well.

    Args:
        target: The folder; its parents are made. What it held before is replaced as a
            whole, and comes back after an error.

    Yields:
        An empty temporary folder beside it.

    Raises:
        FileExistsError: The target is a file.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = part.with_name(f"{part.name}.old")
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # a temporary folder starts out private
        if target.exists():
            os.replace(target, old)  # a folder cannot take the place of a full one
        os.replace(part, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def hash_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hash of a file's bytes in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
