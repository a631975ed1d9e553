"""An adapter on disk: a folder with adapter.json and adapter.safetensors.

Format 2 stores each tensor under its own name. Format 1, of version 0.1, joined them
into one flat array per number type; it is still read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from geopeft_kit.files import hash_of, save_tensors, whole_file

FORMAT = 2
DESCRIPTION = "adapter.json"
TENSORS = "adapter.safetensors"


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
    """
    from geopeft_kit import __version__

    folder = Path(folder)
    description = {
        "format": FORMAT,
        "method": method,
        "config": dict(config),
        "backbone": dict(backbone),
        "geopeft_kit": __version__,
    }
    # safetensors refuses views and tensors that share memory
    arrays = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
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
            text.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
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
    tensors = read_tensors(path)
    if description["format"] == 1:
        tensors = _from_flat_arrays(tensors, description.get("tensors", []), path)
    _check_options(description["config"], tensors, folder / DESCRIPTION)
    return SavedAdapter(
        method=description["method"],
        config=description["config"],
        backbone=description["backbone"],
        tensors=tensors,
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is truncated or not JSON: {error}. Copy the folder again."
        ) from error
    found = description.get("format") if isinstance(description, dict) else None
    if found not in (1, FORMAT):
        raise ValueError(
            f"{path} has format {found!r}; this version of geopeft_kit reads formats "
            f"1 to {FORMAT}. Save the adapter again with this version."
        )
    missing = sorted({"method", "config", "backbone", "sha256"} - set(description))
    if missing:
        raise ValueError(f"{path} lacks {missing}. Copy the folder again.")
    _check_types(description, path)
    return description


def _check_types(description: dict[str, Any], path: Path) -> None:
    """Refuse values of a wrong type."""
    kinds = {"method": str, "config": dict, "backbone": dict, "sha256": str}
    wrong = [name for name, kind in kinds.items()
             if not isinstance(description[name], kind)]  # fmt: skip
    if not wrong and not {"name", "weights_hash"} <= set(description["backbone"]):
        wrong.append("backbone")
    try:  # the index of format 1
        for entry in description.get("tensors", []):
            "".join([entry["name"], entry["dtype"], *entry.get("numbers", [])])
            [int(side) for side in entry["shape"]]
    except (TypeError, ValueError, KeyError, AttributeError):
        wrong.append("tensors")
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is damaged. Copy the folder again.")


def _check_options(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse options larger than any saved tensor: a rank is a side of some tensor."""
    longest = max((side for t in tensors.values() for side in t.shape), default=0)
    for name, value in config.items():
        whole = isinstance(value, int) and name != "alpha"
        if whole and value > max(1024, 4 * longest):
            raise ValueError(
                f"{path}: {name}={value} does not fit its tensors, whose longest side "
                f"is {longest}. Copy the folder again."
            )


def _from_flat_arrays(
    arrays: Mapping[str, Tensor], index: list[dict[str, Any]], path: Path
) -> dict[str, Tensor]:
    """Cut the arrays of format 1 into tensors.

    A line of the index is one shape and number type, "blocks.*.attn.lora_A" and the
    numbers for its stars; its tensors follow one another in the array of that type.
    """
    tensors: dict[str, Tensor] = {}
    position = dict.fromkeys(arrays, 0)
    for entry in index:
        word, shape = entry["dtype"], entry["shape"]
        size = math.prod(shape)
        for numbers in entry.get("numbers", [""]):
            name = entry["name"]
            for number in numbers.split():
                name = name.replace("*", number, 1)
            start = position.get(word, 0)
            position[word] = start + size
            if word not in arrays or start + size > arrays[word].numel():
                break
            tensors[name] = arrays[word][start : start + size].reshape(shape)
    if position != {word: array.numel() for word, array in arrays.items()}:
        raise ValueError(
            f"{path} does not hold the tensors that {DESCRIPTION} lists. Save the "
            "adapter again."
        )
    return tensors
