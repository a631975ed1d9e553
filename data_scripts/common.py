"""What all data scripts share: the way from the upstream files to a chip folder.

A script holds a `Source` (what the data set is), `files` (what it consists of),
`read_chips` (how it becomes chips) and `convert`, which notebooks and tests call.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archives import File, download, gather
from tqdm.auto import tqdm

from geopeft_kit.data import Chip, read_chip_folder, write_chip_folder
from geopeft_kit.data.folder import FACTS

SUBSETS = ("full", "small")
# The PEFT study's split lists, at the commit that their SHA-256 were computed from.
STUDY = (
    "https://raw.githubusercontent.com/IBM/peft-geofm/"
    "a08307ebe699ec87c63368be64139d8471226ce8/datasets_splits"
)


@dataclass(frozen=True)
class Source:
    """A public data set, as `--help` and `--dry-run` show it.

    Attributes:
        name: Name of the chip folder.
        title: Full name.
        paper: How to cite it.
        home: Where it comes from.
        licence: As far as it is known.
        download_mb: Size of the download; 0 where there is none to automate, None
            where upstream does not state it (the server does, before it begins).
        disk_mb: Size of the chip folder, or what its pixels take unpacked, which is
            more.
        steps: How to get it by hand, where no download can be automated.
        small: What `--subset small` takes.
        layout: Who documents the files' names and formats.
    """

    name: str
    title: str
    paper: str
    home: str
    licence: str
    download_mb: float | None
    disk_mb: float
    steps: str = ""
    small: str = ""
    layout: str = ""

    def __str__(self) -> str:
        size = "size not stated here; the server says it before it begins"
        if self.download_mb:
            size = f"about {self.download_mb:,g} MB"
        elif self.download_mb == 0:
            size = "by hand, then --from DIR"
        lines = [
            self.title,
            f"  source   {self.home}",
            f"  paper    {self.paper}",
            f"  licence  {self.licence}",
            f"  download {size}; chip folder up to {self.disk_mb:,g} MB",
            f"  small    {self.small}" if self.small else "",
            f"  layout   {self.layout}" if self.layout else "",
            f"  by hand  {self.steps}" if self.steps else "",
        ]
        return "\n".join(line for line in lines if line)


def make(
    source: Source,
    given: Path | str | None,
    root: Path | str,
    info: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]],
    read_chips: Callable[..., Iterable[Chip]],
    files: Callable[..., Iterable[File]] | None,
    needs: Sequence[str],
    subset: str = "full",
    overwrite: bool = False,
    name: str | None = None,
    **options: Any,
) -> Path:
    """Make a chip folder: fetch, check, unpack, convert; nothing when it is there.

    Args:
        source: What the data set is.
        given: Folder of the upstream files, unpacked or as downloaded; it is only
            read. None downloads.
        root: Where the chip folder is made, and `downloads` beside it.
        info: Facts of the data set, or a function that reads them from the folder;
            licence, citation and source are filled in.
        read_chips: Called with the folder, the subset and the options.
        files: What to fetch, called in the same way; None where nothing can be.
        needs: Files and folders that must be there after unpacking.
        subset: "full" or "small".
        overwrite: Make it again where it stands.
        name: Of the chip folder, where it is not the source's.
        **options: Of this data set; kept in the facts.

    Returns:
        The chip folder.
    """
    target = target_folder(root, name or source.name, subset)
    settings = {"subset": subset, **options}
    if is_done(target, settings, overwrite):
        return target
    work = Path(root) / "downloads" / source.name
    listed = files(work, subset, **options) if files else ()
    if given is None and files is not None and source.download_mb != 0:
        free_space(target, source.disk_mb * (subset == "full"))
        folder = need_files(source, download(listed, work), *needs)
    elif given is None or all((Path(given) / name).exists() for name in needs):
        folder = need_files(source, given, *needs)
    else:
        found = gather(listed, Path(given), work).is_dir()
        folder = need_files(source, work if found else given, *needs)
    facts = {
        "licence": source.licence,
        "citation": source.paper,
        "source": source.home,
        "extra": {"settings": settings},
    }
    chips = read_chips(folder, subset, **options)
    progress = tqdm(chips, "Converting", unit=" chips", mininterval=1)
    facts |= info(folder) if callable(info) else info
    return write_chip_folder(target, progress, facts, overwrite=overwrite)


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
            "some space, or choose another --root or --subset small."
        )


def read_names(path: Path) -> list[str]:
    """The names in a split list, one a line.

    Args:
        path: A text file.

    Returns:
        The names in the list's own order.

    Raises:
        FileNotFoundError: There is no such list.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"the list {path.name} is missing. Put it into the folder that --from "
            "names, or run without --from to fetch it."
        )
    return path.read_text(encoding="utf-8").split()
