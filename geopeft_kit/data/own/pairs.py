"""Images with their masks or labels -> chips.

Pairs come from two folders, two lists or a table (see `tables`). Anything that does
not fit is named; nothing is passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from geopeft_kit.data.chip import Chip
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.data.reading import ChipReader, read_target
from geopeft_kit.open_raster import open_raster

RASTERS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".img")

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass
class Pair:
    """An image with its target, both on disk where the user has them."""

    name: str  # unique, and fit to name a file
    image: Path
    mask: Path | None = None
    label: Any = None  # class name or number
    region: str | None = None  # None leaves it to be found
    split: str | None = None
    date: Any = None
    extra: dict[str, Any] = field(default_factory=dict)  # more columns of the index


def pair_files(
    images: Files, masks: Files, suffixes: tuple[str, str] = ("", "")
) -> list[Pair]:
    """Match images and masks by their stems, less `suffixes`, in the order of names.

    A folder is searched with its sub-folders, whose names become regions.

    Raises:
        FileNotFoundError: A folder or file is missing.
        ValueError: Two files of one stem, or files without a partner, by name.
    """
    found = _by_stem(images, suffixes[0], "image")
    partners = _by_stem(masks, suffixes[1], "mask")
    lonely = sorted(set(found) - set(partners))
    widowed = sorted(set(partners) - set(found))
    if lonely or widowed:
        raise ValueError(
            f"{len(lonely)} images have no mask{_some(lonely)} and {len(widowed)} "
            f"masks have no image{_some(widowed)}. They are matched by name without "
            f"ending.{_suffix_hint(found, partners)} Remove the others, or add what "
            "is missing."
        )
    keys = sorted(found)
    return [
        Pair(name, found[key][0], partners[key][0], region=found[key][1])
        for name, key in zip(unique_names(keys), keys, strict=True)
    ]


def _by_stem(
    files: Files, suffix: str, what: str
) -> dict[str, tuple[Path, str | None]]:
    """Stem (with its sub-folder) -> path and sub-folder."""
    listed: list[tuple[Path, str | None]]
    if isinstance(files, str | os.PathLike):
        root = Path(files)
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {root} of {what}s. Give a folder or a list."
            )
        listed = [
            (path, str(path.parent.relative_to(root)).replace(os.sep, "/"))
            for path in sorted(root.rglob("*"))
            if path.suffix.lower() in RASTERS and not path.name.startswith(".")
        ]
        if not listed:
            raise ValueError(
                f"{root} has no {what}s in it; looked for {', '.join(RASTERS)}."
            )
    else:
        listed = [(Path(path), None) for path in files]
        missing = [path for path, _ in listed if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"there is no {what} {missing[0]}. Check the path.")
    result: dict[str, tuple[Path, str | None]] = {}
    for path, folder in listed:
        region = None if folder in (None, ".") else folder
        stem = path.stem.removesuffix(suffix)
        # A Mac writes the letter "ä" as two characters, other systems as one.
        key = normalize("NFC", f"{region}/{stem}" if region else stem)
        if key in result:
            raise ValueError(
                f"two {what}s are called {key!r}: {result[key][0]} and {path}. Rename "
                "one, or leave one out."
            )
        result[key] = path, region
    return result


def _some(names: Sequence[str]) -> str:
    dots = ", ..." if len(names) > 3 else ""
    return f" ({', '.join(map(repr, names[:3]))}{dots})" if names else ""


def _suffix_hint(images: dict[str, Any], masks: dict[str, Any]) -> str:
    """Proposes suffixes where cutting them off would make partners."""

    def shared_end(stems: list[str]) -> str:
        return os.path.commonprefix([stem[::-1] for stem in stems])[::-1]

    ends = shared_end(list(images)), shared_end(list(masks))
    cut = [
        {stem.removesuffix(end) for stem in stems}
        for stems, end in zip((images, masks), ends, strict=True)
    ]
    partners = cut[0] & cut[1] - {""}
    return f" Perhaps you want suffixes={ends!r}." if any(ends) and partners else ""


def safe_name(key: str) -> str:
    """The key with "_" for all that cannot be in the name of a file."""
    name = re.sub(r"[^\w.-]+", "_", normalize("NFC", key))
    return name if re.match(r"\w", name) else f"_{name}"


def unique_names(keys: Sequence[str]) -> list[str]:
    """Safe names of different keys; where two would be the same, with a number."""
    names: dict[str, None] = {}
    for key in keys:
        name = base = safe_name(key)
        number = 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names[name] = None
    return list(names)


def pair_chips(
    pairs: Sequence[Pair], info: DatasetInfo, numbers: Mapping[int, int | None]
) -> Iterator[Chip]:
    """Chips of pairs, each read once and checked; files stay where they are.

    Only masks are written anew where `numbers` (in the user's masks -> of the class)
    differ.

    Raises:
        ValueError: Files that do not fit the facts or each other.
    """
    reader = ChipReader(Path(), info, range(len(info.bands)), numbers)
    same = all(value == number for value, number in numbers.items())
    for pair in pairs:
        mask = str(pair.mask) if pair.mask else None
        stored = reader.read(pair.name, str(pair.image), mask=mask)
        yield Chip(
            pair.name,
            pair.image.resolve(),
            pair.mask.resolve() if pair.mask and same else stored.mask,
            label=pair.label,
            region=pair.region or "everywhere",
            split=pair.split,
            date=pair.date,
            extra=pair.extra,
        )


def found_targets(pairs: Sequence[Pair]) -> str:
    """Labels, or mask values of up to eight masks, for a question."""
    values: set[Any] = set()
    for label in (pair.label for pair in pairs if pair.label is not None):
        values |= {label} if np.ndim(label) == 0 else set(label)
    masks = [pair.mask for pair in pairs if pair.mask is not None]
    for mask in masks[:: max(1, len(masks) // 8)][:8]:
        with open_raster(mask, mask.stem) as raster:
            found, empty = read_target(raster, f"mask {mask}")
        values |= set(np.unique(found[~empty]).tolist())
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = ", ".join(map(str, ordered[:20]))
    return f"{shown}{', ...' if len(values) > 20 else ''}"
