"""What all data scripts share: the options, safe archives, windows, and a summary.

A script holds a `Source` (what the data set is) and a function `convert(source, root,
...)` that notebooks and tests call; the command line is the same for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from geopeft_kit.data import read_chip_folder
from geopeft_kit.data.folder import FACTS

SUBSETS = ("full", "small")


@dataclass(frozen=True)
class Source:
    """A public data set, as `--help` and `--dry-run` show it.

    Attributes:
        name: Name of the chip folder.
        title: Full name.
        paper: How to cite it.
        home: Where it comes from.
        licence: As far as it is known.
        download_mb: Size of the download; 0 where there is none to automate.
        disk_mb: Size of the chip folder.
        steps: How to get it by hand, where no download can be automated.
    """

    name: str
    title: str
    paper: str
    home: str
    licence: str
    download_mb: float
    disk_mb: float
    steps: str = ""

    def __str__(self) -> str:
        lines = [
            self.title,
            f"  source   {self.home}",
            f"  paper    {self.paper}",
            f"  licence  {self.licence}",
            f"  download {self.download_mb:g} MB, chip folder {self.disk_mb:g} MB",
        ]
        return "\n".join(lines)


def main(
    source: Source,
    convert: Callable[..., Path],
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Run a data script from the command line.

    Args:
        source: What the data set is.
        convert: Makes the chip folder; takes the folder of the upstream files (None:
            download), the root, and the options by name.
        options: Adds options of one data set alone.
    """
    parser = argparse.ArgumentParser(
        description=str(source), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        help="the chip folder is made in here (default: data)",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="folder",
        metavar="DIR",
        help="convert the upstream files in DIR; download nothing",
    )
    parser.add_argument(
        "--subset",
        choices=SUBSETS,
        default="full",
        help="small: a stated part, contained in full",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show source, sizes and licence, then stop",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make the chip folder again"
    )
    if options is not None:
        options(parser)
    settings = vars(parser.parse_args())
    print(source)
    if settings.pop("dry_run"):
        return
    try:
        folder = convert(settings.pop("folder"), settings.pop("root"), **settings)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1)
    print(summary(folder))


def target_folder(root: Path | str, name: str, subset: str) -> Path:
    """Where the chip folder of a subset stands."""
    if subset not in SUBSETS:
        raise ValueError(f"subset is {subset!r}; allowed are {', '.join(SUBSETS)}.")
    return Path(root) / (name if subset == "full" else f"{name}_{subset}")


def is_done(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the chip folder stands already, made with the same settings.

    Args:
        folder: The chip folder.
        settings: What it was asked to be made with; kept in its facts.
        overwrite: Make it again in any case.

    Returns:
        True where nothing is to do.

    Raises:
        ValueError: It stands there, made with other settings.
    """
    if overwrite or not (folder / FACTS).exists():
        return False
    made_with = read_chip_folder(folder)[0].extra.get("settings", {})
    if json.loads(json.dumps(settings)) != made_with:
        raise ValueError(
            f"{folder} was made with {made_with}, not with {settings}. Choose another "
            "--root, or make it again with --overwrite."
        )
    print(f"{folder} is there already; nothing to do.")
    return True


def need_files(source: Source, folder: Path | str | None, *names: str) -> Path:
    """The folder of the upstream files, after a look at what it holds.

    Args:
        source: What the data set is.
        folder: The folder, or None where none was given.
        names: Files or folders that must be in it.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: It or one of the names is missing; says how to get them.
    """
    steps = source.steps or f"Download them from {source.home}."
    if folder is None:
        raise FileNotFoundError(
            f"the files of {source.title} cannot be fetched by a script. {steps}"
        )
    missing = [name for name in names if not (Path(folder) / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {', '.join(missing)}. {steps}")
    return Path(folder)


def check_md5(path: Path, expected: str) -> Path:
    """Compare a download with the MD5 that the source publishes.

    Args:
        path: The file; removed when it differs.
        expected: 32 hexadecimal digits.

    Returns:
        The path.

    Raises:
        RuntimeError: The file is another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        path.unlink()
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
        raise RuntimeError(
            f"{path} has MD5 {found}, but its source publishes {expected}. It was "
            "removed; run the script again, and report it if it happens twice."
        )
    return path


def unzip(archive: Path, folder: Path) -> Path:
    """Unpack a zip file, refusing members that point out of the folder.

    Args:
        archive: The file.
        folder: Where its members go.

    Returns:
        The folder.

    Raises:
        ValueError: No zip file, or one with an absolute path, a `..` or a link.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                target = (folder / member.filename).resolve()
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or not target.is_relative_to(folder.resolve()):
                    raise ValueError(
                        f"{archive} holds {member.filename!r}, which points out of the "
                        "folder. Nothing was unpacked; do not trust this file."
                    )
            file.extractall(folder)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{archive} is no zip file ({error}). Remove it and run the script again."
        ) from error
    return folder


def free_space(folder: Path, needed_mb: float) -> None:
    """Refuse to start a conversion that the disk cannot hold.

    Args:
        folder: Where it will be written.
        needed_mb: Megabytes.

    Raises:
        OSError: There is less room.
    """
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free / 1e6
    if free < needed_mb:
        raise OSError(
            f"{there} has {free:.0f} MB free, and {needed_mb:.0f} MB are needed. Free "
            "some space, or choose another --root."
        )


def read_raster(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """All bands of a raster, and where it lies.

    Args:
        path: Anything that rasterio opens.

    Returns:
        (C, H, W) values, and `crs` and `transform` by name.

    Raises:
        RuntimeError: The file cannot be read, being cut short for instance.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                return raster.read(), {"crs": raster.crs, "transform": raster.transform}
    except RasterioError as error:
        raise RuntimeError(
            f"{path} cannot be read: {error}. Copy or download it again."
        ) from error


def windows(
    height: int, width: int, size: int, left: int = 0, right: int | None = None
) -> Iterator[tuple[int, int]]:
    """Corners of square windows that lie side by side inside a raster.

    Args:
        height: Of the raster.
        width: Of the raster.
        size: Of a window.
        left: First column to use.
        right: Column to stop before; None for the raster's width.

    Yields:
        (row, column) of the upper left corner.
    """
    right = width if right is None else right
    for row in range(0, height - size + 1, size):
        for column in range(left, right - size + 1, size):
            yield row, column


def summary(folder: Path) -> str:
    """What stands in a chip folder, in a few lines."""
    info, index = read_chip_folder(folder)
    counts = index.groupby(["region", index["split"].fillna("-")]).size()
    lines = [f"{info.name}: {len(index)} chips in {folder}"]
    lines += [
        f"  {region:<16} {split:<12} {n:>6}" for (region, split), n in counts.items()
    ]
    return "\n".join(lines)
