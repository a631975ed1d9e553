"""Files and folders written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path with the same suffix, moved to `target` when all went well."""
    handle, name = tempfile.mkstemp(
        prefix=".", suffix=f".part{target.suffix}", dir=target.parent
    )
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # a temporary file starts out private
        os.replace(part, target)
        remove_side_files(target)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors; a full disk is the OSError that it is."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(
            f"{path.parent} took no more: {error}. Is the disk full? Free some space "
            "or choose another folder, then save again."
        ) from error


def remove_side_files(raster: Path) -> None:
    """Remove overviews, statistics and masks beside a raster that was replaced."""
    for end in (".ovr", ".aux.xml", ".msk"):
        Path(f"{raster}{end}").unlink(missing_ok=True)


def check_not_input(targets: Iterable[Path], inputs: Iterable[str]) -> None:
    """Refuse to write onto a file that is read, whatever its path is spelled like."""
    for target in filter(Path.exists, targets):
        for name in inputs:
            if Path(name).exists() and target.samefile(name):
                raise ValueError(
                    f"{target} is the input itself, {name}. Choose another name for "
                    "what is written."
                )


@contextmanager
def whole_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary folder, moved to `target` when all went well.

    `replace=False` keeps an existing folder that is not empty, for folders that are
    named after their content. Raises FileExistsError where the target is a file, or is
    kept.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose another folder.")
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name[:16]}.", dir=target.parent))
    old = part.with_name(f"{part.name}.old")
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # a temporary folder starts out private
        if target.is_dir() and (replace or not any(target.iterdir())):
            os.replace(target, old)
        _move(part, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it holds the target, or something new
                folder.rmdir()


def _move(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except OSError as error:
        if not target.exists():
            raise
        raise FileExistsError(
            error.errno, "something is there already", str(target)
        ) from error


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def hash_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hash of a file's bytes in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def content_key(facts: Any, files: Iterable[str | os.PathLike[str]] = ()) -> str:
    """Name for a cache that changes with all that its content is made from.

    Args:
        facts: Plain JSON: names, numbers, lists, mappings.
        files: Whose bytes count, in this order; their names belong to `facts`.

    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in files:
        total.update(hash_of(file).encode())
    return total.hexdigest()
