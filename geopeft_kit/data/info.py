"""What a chip folder says about itself: `dataset.json`, read and checked.

One small frozen dataclass mirrors the file. Everything in it is plain JSON, so
that a folder can be made by hand or by another program. Taught in
`notebooks/14_your_own_data.ipynb`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geopeft_kit.bands import resolve_bands

TASKS = ("segmentation", "regression", "classification", "multilabel", "change")
MASK_TASKS = ("segmentation", "regression", "change")
CLASS_TASKS = ("segmentation", "classification", "multilabel", "change")
FORMAT = "geopeft chip folder 1"


@dataclass(frozen=True)
class DatasetInfo:
    """The facts that hold for every chip of a data set.

    Attributes:
        name: For titles; simulated data begins with "Simulated".
        task: One of "segmentation", "regression", "classification", "multilabel",
            "change".
        bands: Names of the channels of every image file, in their order.
        classes: Class names, in the order of their numbers; empty for regression.
        colours: One "#rrggbb" a class, or empty.
        scale: Reflectance of one stored unit: one number, or one a band.
        offset: Added after scaling: reflectance = stored * scale + offset.
        nodata: Stored value that means "no data"; None leaves it to each file's own
            nodata tag.
        ignore_index: Mask value without a label; left out of losses and scores. In
            regression 255 is a value like any other.
        licence: Of the data.
        citation: How to cite it.
        source: Where it comes from.
        notes: Traps and choices of the conversion, in a sentence or two.
        simulated: True where no satellite was involved.
        extra: Anything else that is JSON.
    """

    name: str
    task: str
    bands: tuple[str, ...]
    classes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0
    nodata: float | None = None
    ignore_index: int = 255
    licence: str = "not stated"
    citation: str = ""
    source: str = ""
    notes: str = ""
    simulated: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("bands", "classes", "colours", "scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "bands", resolve_bands(self.bands))
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; allowed are {', '.join(TASKS)}.")
        _check_types(self)
        self._check_classes()
        for name in ("scale", "offset"):
            _check_per_band(name, getattr(self, name), self.bands)

    def _check_classes(self) -> None:
        if self.task not in CLASS_TASKS:
            return
        if not self.classes or isinstance(self.classes, str):
            raise ValueError(
                f"task {self.task!r} needs classes, a list of names in the order of "
                "their numbers, as ['dry', 'water']."
            )
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"class names are not unique: {list(self.classes)}.")
        if 0 <= self.ignore_index < len(self.classes):
            raise ValueError(
                f"ignore_index is {self.ignore_index}, which is the number of the "
                f"class {self.classes[self.ignore_index]!r}. Use 255 or -1."
            )
        if self.colours and len(self.colours) != len(self.classes):
            raise ValueError(
                f"{len(self.colours)} colours for {len(self.classes)} classes; give "
                "one each, or none."
            )
        wrong = [c for c in self.colours if not re.fullmatch("#[0-9a-fA-F]{6}", c)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a colour; write '#rrggbb'.")

    @property
    def num_classes(self) -> int:
        """Channels of a model's output: the classes, or 1 for regression."""
        return len(self.classes) if self.task in CLASS_TASKS else 1

    @property
    def target(self) -> str:
        """Column of the index that holds the target: "mask" or "label"."""
        return "mask" if self.task in MASK_TASKS else "label"

    def class_number(self, label: int | str) -> int:
        """Number, from 0, of a class given by name or number; else ValueError."""
        if isinstance(label, str):
            if label in self.classes:
                return self.classes.index(label)
        elif 0 <= int(label) < len(self.classes) and int(label) == label:
            return int(label)
        raise ValueError(
            f"label {label!r} is none of the {len(self.classes)} classes: 0-"
            f"{len(self.classes) - 1} ({', '.join(self.classes)})."
        )

    def class_numbers(self, labels: Any) -> list[int]:
        """Numbers of several classes: a list, or text as "a;b", "a|b" or "['a', 'b']".

        A comma separates only where the text as a whole is no class.
        """
        if not isinstance(labels, str):
            labels = [labels] if np.ndim(labels) == 0 else labels
            return [self.class_number(label) for label in labels]
        text = labels.strip()
        if text in self.classes:
            return [self.class_number(text)]
        text = text.removeprefix("[").removesuffix("]")
        mark = next((mark for mark in ";|" if mark in text), ",")
        parts = [part.strip(" '\"") for part in text.split(mark)]
        return [
            self.class_number(int(part) if part.isdecimal() else part)
            for part in parts
            if part
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetInfo:
        """Build from the attributes by name; an unknown name is a ValueError."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [name for name in values if name not in fields]
        if unknown:
            near = difflib.get_close_matches(unknown[0], fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown name {unknown[0]!r} in the data set's facts.{hint} Allowed "
                f"are {', '.join(fields)}; put anything else under 'extra'."
            )
        missing = [n for n in ("name", "task", "bands") if not values.get(n)]
        if missing:
            raise ValueError(
                f"the data set's facts lack {', '.join(missing)}. Needed are a name, a "
                f"task ({', '.join(TASKS)}) and the bands of the image files."
            )
        return cls(**values)

    def to_json(self, index_sha256: str) -> str:
        """The text of `dataset.json`, with the hash of `chips.parquet`."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        values["chips_sha256"] = index_sha256
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> tuple[DatasetInfo, str]:
        """The checked facts, and the hash that `chips.parquet` must have."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not readable as JSON: {error}. Write the chip folder again."
            ) from error
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"{path} says format {found!r}; this version reads {FORMAT!r}. Write "
                "the folder with write_chip_folder, or update geopeft_kit."
            )
        digest = values.pop("chips_sha256", None)
        if not isinstance(digest, str):
            raise ValueError(
                f"{path} has no chips_sha256, the hash of its index. Write the chip "
                "folder again."
            )
        try:
            return cls.from_dict(values), digest
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def mask_value_message(
    name: str, wrong: Sequence[float], info: DatasetInfo, numbers: Any = None
) -> str:
    """What to say about mask values of a chip that are not a class."""
    allowed = f"0-{len(info.classes) - 1} ({', '.join(info.classes)})"
    if numbers:
        allowed = ", ".join(map(str, numbers))
    return (
        f"chip {name!r}: mask value {', '.join(f'{v:g}' for v in wrong[:5])} is "
        f"outside the classes; allowed are {allowed} and {info.ignore_index} (no "
        "label). Correct the mask, or add it to classes; {number: None} is no label."
    )


def _check_types(info: DatasetInfo) -> None:
    """Refuse values of a wrong type, which a file made by hand may hold."""
    for name in ("name", "licence", "citation", "source", "notes"):
        if not isinstance(getattr(info, name), str):
            raise ValueError(f"{name} is {getattr(info, name)!r}; it must be text.")
    for name in ("classes", "colours"):
        values = getattr(info, name)
        if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{name} is {values!r}; it must be a list of text.")
    if not isinstance(info.ignore_index, int):
        raise ValueError(
            f"ignore_index is {info.ignore_index!r}; it must be a whole number."
        )
    if info.nodata is not None and not isinstance(info.nodata, int | float):
        raise ValueError(f"nodata is {info.nodata!r}; it must be a number or None.")
    if not isinstance(info.simulated, bool) or not isinstance(info.extra, Mapping):
        raise ValueError("simulated must be true or false, and extra a mapping.")


def _check_per_band(name: str, value: object, bands: Sequence[str]) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) != len(bands):
        raise ValueError(
            f"{name} has {len(value)} numbers for {len(bands)} bands; give one number "
            "for all, or one a band."
        )
    if not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"{name} is {value!r}; it must be a number, or one a band.")
    if name == "scale" and 0 in numbers:
        raise ValueError(
            "scale is 0, which turns every image black; use for instance "
            "0.0001 if 10000 means reflectance 1."
        )
