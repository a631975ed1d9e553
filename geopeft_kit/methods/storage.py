"""An adapter on disk: a folder with adapter.json and adapter.safetensors.

The tensors are concatenated into one flat array per number type, and adapter.json lists
them. Names that differ in a block number only, with the same shape, share a line there:
a star in place of the number, and the numbers. A header with one entry per tensor would
be 30 KB for a ViT-L; this is 2.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from geopeft_kit.files import hash_of, save_tensors, whole_file

FORMAT = 1
DESCRIPTION = "adapter.json"
TENSORS = "adapter.safetensors"
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")  # a name's parts that are numbers


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter folder."""

    method: str
    config: dict[str, Any]  # arguments for `attach`
    backbone: dict[str, str]  # its `name` and `weights_hash`
    tensors: dict[str, Tensor]  # by dotted path inside `backbone.model`


def write_adapter(
    folder: str | Path,
    method: str,
    config: Mapping[str, Any],
    backbone: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write the fields of a `SavedAdapter`; an error leaves nothing half-written.

    The folder is made if needed; other files in it stay.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    from geopeft_kit import __version__

    folder = Path(folder)
    arrays, index = _pack(tensors)
    description = {
        "format": FORMAT,
        "method": method,
        "config": dict(config),
        "backbone": dict(backbone),
        "geopeft_kit": __version__,
        "tensors": index,
    }
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # The tensors are renamed first. The description holds their checksum, so a kill
        # between the two is noticed on loading.
        with (
            whole_file(folder / DESCRIPTION) as text,
            whole_file(folder / TENSORS) as data,
        ):
            save_tensors(arrays, data)
            description["sha256"] = hash_of(data)
            text.write_text(_readable(description), encoding="utf-8")
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Read an adapter folder.

    Raises:
        FileNotFoundError: The folder, or one of its two files, is not there.
        ValueError: A file is truncated, changed, or of another format.
    """
    folder = Path(folder)
    for name in (DESCRIPTION, TENSORS):
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            raise FileNotFoundError(
                f"{folder / name} does not exist (the folder holds {found}). An "
                f"adapter is a folder written by adapter.save, with {DESCRIPTION} and "
                f"{TENSORS}."
            )
    description = _read_description(folder / DESCRIPTION)
    path = folder / TENSORS
    digest = hash_of(path)
    if digest != description["sha256"]:
        raise ValueError(
            f"{path} is truncated or changed: sha256 {digest[:12]}, expected "
            f"{description['sha256'][:12]}. Copy the folder again, or save the adapter "
            "again."
        )
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    return SavedAdapter(
        method=description["method"],
        config=description["config"],
        backbone=description["backbone"],
        tensors=_unpack(arrays, description["tensors"], path),
    )


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is truncated or not JSON: {error}. Copy the folder again."
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise ValueError(
            f"{path} has format {found!r}; this version of geopeft_kit reads format "
            f"{FORMAT}. Save the adapter again with this version."
        )
    keys = {"method", "config", "backbone", "tensors", "sha256"}
    missing = sorted(keys - set(description))
    if missing:
        raise ValueError(f"{path} lacks {missing}. Copy the folder again.")
    _check_types(description, path)
    return description


def _check_types(description: dict[str, Any], path: Path) -> None:
    """Refuse values of a wrong type, and options larger than any saved tensor.

    An option, a rank for instance, is a side of some tensor; `alpha` is not.
    """
    kinds = {"method": str, "config": dict, "backbone": dict, "sha256": str}
    wrong = [name for name, kind in kinds.items()
             if not isinstance(description[name], kind)]  # fmt: skip
    if not wrong and not {"name", "weights_hash"} <= set(description["backbone"]):
        wrong.append("backbone")
    sides = [0]
    try:
        for entry in description["tensors"]:
            "".join([entry["name"], entry["dtype"], *entry.get("numbers", [])])
            sides += [int(side) for side in entry["shape"]]
    except (TypeError, ValueError, KeyError, AttributeError):
        wrong.append("tensors")
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is damaged. Copy the folder again.")
    for name, value in description["config"].items():
        whole = isinstance(value, int) and name != "alpha"
        if whole and value > max(1024, 4 * max(sides)):
            raise ValueError(
                f"{path}: {name}={value} does not fit its tensors, whose longest side "
                f"is {max(sides)}. Copy the folder again."
            )


def _pack(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Concatenate tensors; return the flat arrays and the index of what is where."""
    groups: dict[tuple[str, tuple[int, ...], torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        kind = (_NUMBER.sub("*", name), tuple(tensor.shape), tensor.dtype)
        groups.setdefault(kind, []).append(name)
    parts: dict[str, list[Tensor]] = {}
    index = []
    for (pattern, shape, dtype), names in groups.items():
        word = str(dtype).removeprefix("torch.")
        entry = {"name": pattern, "shape": list(shape), "dtype": word}
        if "*" in pattern:
            entry["numbers"] = [" ".join(_NUMBER.findall(name)) for name in names]
        index.append(entry)
        parts.setdefault(word, []).extend(
            tensors[name].detach().cpu().reshape(-1) for name in names
        )
    return {word: torch.cat(members) for word, members in parts.items()}, index


def _unpack(
    arrays: Mapping[str, Tensor], index: list[dict[str, Any]], path: Path
) -> dict[str, Tensor]:
    """Cut the flat arrays into named tensors; the opposite of `_pack`."""
    tensors: dict[str, Tensor] = {}
    position = dict.fromkeys(arrays, 0)
    for entry in index:
        word, shape = entry["dtype"], entry["shape"]
        size = math.prod(shape)
        for numbers in entry.get("numbers", [""]):
            filling = iter(numbers.split())
            name = "".join(
                next(filling) if part == "*" else part
                for part in re.split(r"(\*)", entry["name"])
            )
            start = position.get(word, 0)
            if word not in arrays or start + size > arrays[word].numel():
                raise ValueError(
                    f"{path} is too short for {name!r} {shape} {word}, which "
                    f"{DESCRIPTION} lists. Save the adapter again."
                )
            tensors[name] = arrays[word][start : start + size].reshape(shape)
            position[word] = start + size
    left = {word: a.numel() - position[word] for word, a in arrays.items()}
    if any(left.values()):
        raise ValueError(
            f"{path} holds {left} numbers more than {DESCRIPTION} lists. Save the "
            "adapter again."
        )
    return tensors


def _readable(description: dict[str, Any]) -> str:
    """JSON with one line per kind of tensor: as short as `dumps`, and readable."""
    head = {k: v for k, v in description.items() if k != "tensors"}
    lines = ",\n    ".join(json.dumps(entry) for entry in description["tensors"])
    text = json.dumps(head, indent=2)[:-2]  # without the closing brace
    return f'{text},\n  "tensors": [\n    {lines}\n  ]\n}}\n'
