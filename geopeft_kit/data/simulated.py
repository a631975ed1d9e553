"""Chip folders of simulated scenes: the embedded data of lessons and tests.

`simulated_data` makes scenes of the regions it is asked for, cuts them into chips,
writes them once as a chip folder and hands back the usual `ChipData`. Taught in
`notebooks/00_quickstart.ipynb`.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.transform import from_origin

from geopeft_kit.bands import resolve_bands
from geopeft_kit.data.chip import Chip
from geopeft_kit.data.chips import ChipData
from geopeft_kit.data.folder import FACTS, write_chip_folder
from geopeft_kit.data.info import DatasetInfo
from geopeft_kit.download import cache_folder
from geopeft_kit.files import content_key
from geopeft_kit.world import (
    GENERATOR_VERSION,
    LAND_COVER_CLASSES,
    PIXEL,
    REGIONS,
    Scene,
    simulate_scene,
)

SCALE = 1e-4
"""Reflectance of one stored unit; pixels are stored as uint16."""

LESSON_PLACES = 1_000_000
"""Places with smaller numbers are never in `simulated_data`, so that a pretraining
corpus that draws its seeds below this shares no scene with a lesson."""

_CLOUDED = 0.6  # an opacity above this hides the ground: no label


@dataclass(frozen=True)
class _Lesson:
    """What a task needs from the world."""

    title: str
    task: str
    label: str
    event: str
    classes: Mapping[str, str]
    note: str


_LESSONS: Mapping[str, _Lesson] = {
    "flood": _Lesson(
        "Simulated floods",
        "segmentation",
        "flood",
        "flood",
        {"land": "#d9d4c7", "water": "#2f6fd0"},
        "Water is permanent water and flood, also under trees and standing crops. "
        "Every fourth scene has no flood.",
    ),
    "burn": _Lesson(
        "Simulated burn scars",
        "segmentation",
        "burn",
        "burn",
        {"unburnt": "#d9d4c7", "burnt": "#d1495b"},
        "Only fresh scars count; scars of earlier years, peat and ploughed basalt do "
        "not. Every fourth scene has no fire.",
    ),
    "land_cover": _Lesson(
        "Simulated land cover",
        "segmentation",
        "land_cover",
        "none",
        LAND_COVER_CLASSES,
        "Class shares differ strongly between regions: that is a shift of labels, not "
        "of pixels only.",
    ),
    "building_density": _Lesson(
        "Simulated building density",
        "regression",
        "building_density",
        "none",
        {},
        "Share of the pixel covered by roofs, 0-1; skies are clear.",
    ),
    "road_density": _Lesson(
        "Simulated road density",
        "regression",
        "road_density",
        "none",
        {},
        "Share of the pixel covered by paved roads and streets, 0-1; skies are clear.",
    ),
    "change": _Lesson(
        "Simulated construction",
        "change",
        "change",
        "construction",
        {"unchanged": "#d9d4c7", "built": "#e07b39"},
        "Built is what was built on between the two dates; harvest, weather and season "
        "are no change. Every fourth scene has none.",
    ),
}


@dataclass(frozen=True)
class _Recipe:
    """Everything that decides about the pixels."""

    task: str
    bands: tuple[str, ...]
    regions: tuple[str, ...]
    chips_per_region: int
    chips_per_scene: int
    size: int
    scene_size: int
    seed: int
    shift: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.task not in _LESSONS:
            raise ValueError(
                f"Unknown task {self.task!r}; choose from {', '.join(_LESSONS)}."
            )
        if self.size < 16 or self.scene_size < self.size:
            raise ValueError(
                f"size is {self.size} and scene_size {self.scene_size}; chips need 16 "
                "pixels or more and have to fit into a scene."
            )
        if self.chips_per_region < 1 or self.chips_per_scene < 1:
            raise ValueError(
                f"chips_per_region is {self.chips_per_region} and chips_per_scene "
                f"{self.chips_per_scene}; both must be 1 or more."
            )

    def to_dict(self) -> dict[str, Any]:
        """As `dataset.json` holds it, plain JSON."""
        return json.loads(json.dumps(vars(self) | {"version": GENERATOR_VERSION}))


def simulated_data(
    task: str = "flood",
    bands: str | Sequence[str] = "hls",
    chips_per_region: int = 24,
    size: int = 64,
    scene_size: int = 256,
    train_regions: Sequence[str] | None = None,
    test_regions: Sequence[str] = ("savanna",),
    seed: int = 0,
    batch_size: int = 8,
    folder: str | os.PathLike[str] | None = None,
    chips_per_scene: int = 4,
    shift: Mapping[str, float] | None = None,
    **options: Any,
) -> ChipData:
    """Make a simulated data set, or take it from the cache.

    Args:
        task: "flood", "burn", "land_cover", "building_density", "road_density" or
            "change".
        bands: Sensor or band names, out of Sentinel-2's twelve.
        chips_per_region: Chips of each region.
        size: Side of a chip in pixels of 10 m; may equal `scene_size`.
        scene_size: Side of a scene in pixels.
        train_regions: Regions to train on; None takes all that are not held out.
        test_regions: Regions to hold out.
        seed: Other seeds give other places.
        batch_size: Chips in a batch.
        folder: Where to write; None takes a folder in the cache, named after all that
            decides about the pixels.
        chips_per_scene: Chips cut from one scene; fewer means more scenes, more
            variety and more time. Chips of one scene are either all for training or
            all for validation.
        shift: Turns light, air or season of all scenes; keys as in
            `geopeft_kit.world.SHIFTS`.
        **options: Passed on to `ChipData`, as `val_fraction` or `augment`.

    Returns:
        The data; `data.simulated` is True and `data.name` begins with "Simulated".

    Raises:
        ValueError: Unknown task, region, band or shift, or sizes that do not fit.
        FileExistsError: `folder` holds another data set.
    """
    recipe = _Recipe(
        task=task,
        bands=resolve_bands(bands),
        regions=_regions(train_regions, test_regions),
        chips_per_region=chips_per_region,
        chips_per_scene=min(chips_per_scene, max(scene_size // max(size, 1), 1) ** 2),
        size=size,
        scene_size=scene_size,
        seed=seed,
        shift={key: float(value) for key, value in (shift or {}).items()},
    )
    if folder is None:
        key = content_key(recipe.to_dict())[:16]
        folder = cache_folder() / "simulated" / f"{task}-{key}"
    folder = Path(folder)
    if not _is_there(folder, recipe):
        with suppress(FileExistsError):  # another process was faster
            write_chip_folder(folder, _chips(recipe), _info(recipe))
    return ChipData(
        folder,
        test_regions=list(test_regions),
        batch_size=batch_size,
        **{"seed": seed, **options},
    )


def _regions(train: Sequence[str] | None, test: Sequence[str]) -> tuple[str, ...]:
    """All regions that chips are made of, checked and in the world's order."""
    for name, value in (("train", train), ("test", test)):
        if isinstance(value, str):
            raise ValueError(f"{name}_regions is a text; write [{value!r}].")
    held_out = set(test)
    trained = set(REGIONS) - held_out if train is None else set(train)
    unknown = sorted((trained | held_out) - set(REGIONS))
    if unknown:
        raise ValueError(
            f"Unknown region {unknown[0]!r}; choose from {', '.join(REGIONS)}."
        )
    if trained & held_out:
        raise ValueError(
            f"{sorted(trained & held_out)[0]!r} is to be trained on and held out; take "
            "it out of train_regions or test_regions."
        )
    if not trained or not held_out:
        raise ValueError("Name at least one region to train on and one to hold out.")
    return tuple(name for name in REGIONS if name in trained | held_out)


def _is_there(folder: Path, recipe: _Recipe) -> bool:
    """Whether the folder holds exactly this data set already."""
    if not (folder / FACTS).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} is not empty and holds no data set. Choose another folder."
            )
        return False
    info, _ = DatasetInfo.read(folder / FACTS)
    if info.extra.get("recipe") != recipe.to_dict():
        raise FileExistsError(
            f"{folder} holds {info.name!r}, made from other arguments or by another "
            "version. Delete it, choose another folder, or leave folder out."
        )
    return True


def _info(recipe: _Recipe) -> DatasetInfo:
    """The facts of the data set."""
    lesson = _LESSONS[recipe.task]
    return DatasetInfo(
        name=lesson.title,
        task=lesson.task,
        bands=recipe.bands,
        classes=tuple(lesson.classes),
        colours=tuple(lesson.classes.values()),
        scale=SCALE,
        licence="CC0-1.0",
        citation="Simulated by geopeft_kit; no satellite was involved.",
        source=f"geopeft_kit.world, generator version {GENERATOR_VERSION}",
        notes=lesson.note,
        simulated=True,
        extra={"recipe": recipe.to_dict()},
    )


def _chips(recipe: _Recipe) -> Iterator[Chip]:
    """Scenes one after another, cut into chips."""
    from tqdm.auto import tqdm

    scenes = -(-recipe.chips_per_region // recipe.chips_per_scene)
    total = recipe.chips_per_region * len(recipe.regions)
    # disable=None: a bar in a terminal or notebook, nothing in a log.
    with tqdm(total=total, desc="simulating", leave=False, disable=None) as bar:
        for region in recipe.regions:
            for number in range(scenes):
                left = recipe.chips_per_region - number * recipe.chips_per_scene
                count = min(left, recipe.chips_per_scene)
                scene = _scene(recipe, region, number)
                for chip in _cut(recipe, scene, count):
                    yield chip
                    bar.update()


def _scene(recipe: _Recipe, region: str, number: int) -> Scene:
    """Scene `number` of a region; every fourth one has no event."""
    lesson = _LESSONS[recipe.task]
    shift = dict(recipe.shift)
    if lesson.task == "regression":
        shift["cloud"] = -1.0
    return simulate_scene(
        region,
        seed=LESSON_PLACES + 1000 * recipe.seed + number,
        size=recipe.scene_size,
        bands=recipe.bands,
        event="none" if number % 4 == 3 else lesson.event,
        shift=shift,
        pair=lesson.task == "change",
    )


def _cut(recipe: _Recipe, scene: Scene, count: int) -> Iterator[Chip]:
    """The chips of a scene: half those with most in the label, half at random."""
    lesson, size = _LESSONS[recipe.task], recipe.size
    mask = _mask(lesson, scene)
    after = _stored(scene.image)
    before = after if scene.before is None else _stored(scene.before)
    pair = lesson.task == "change"
    day = dt.date(2021, 1, 1) + dt.timedelta(days=int(scene.scalars["day_of_year"]))
    for row, column in _tiles(recipe, scene, mask, count):
        window = np.s_[..., row : row + size, column : column + size]
        yield Chip(
            name=f"{scene.region}_{scene.seed}_{row}_{column}",
            image=before[window],
            image_after=after[window] if pair else None,
            mask=mask[window],
            region=scene.region,
            crs=scene.crs,
            transform=from_origin(
                scene.bounds[0] + column * PIXEL,
                scene.bounds[3] - row * PIXEL,
                PIXEL,
                PIXEL,
            ),
            date=day - dt.timedelta(days=24) if pair else day,
            date_after=day if pair else None,
            extra={"scene": f"{scene.region}_{scene.seed}", "event": scene.event},
        )


def _stored(image: np.ndarray) -> np.ndarray:
    """Reflectance as it is stored, uint16."""
    return np.rint(image / SCALE).astype(np.uint16)


def _mask(lesson: _Lesson, scene: Scene) -> np.ndarray:
    """The label, 255 where clouds hide the ground on any date."""
    mask = scene.labels[lesson.label]
    if lesson.task == "regression":
        return mask
    clouded = scene.physical["cloud"] > _CLOUDED
    if lesson.task == "change":
        clouded |= scene.physical["cloud_before"] > _CLOUDED
    return np.where(clouded, np.uint8(255), mask)


def _tiles(
    recipe: _Recipe, scene: Scene, mask: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """Upper left corners of the chips to cut."""
    steps = range(0, recipe.scene_size - recipe.size + 1, recipe.size)
    corners = [(row, column) for row in steps for column in steps]
    rng = np.random.default_rng([scene.seed, list(REGIONS).index(scene.region)])
    corners = [corners[k] for k in rng.permutation(len(corners))]

    def variety(corner: tuple[int, int]) -> float:
        row, column = corner
        part = mask[row : row + recipe.size, column : column + recipe.size]
        return -float(part[part != 255].std()) if (part != 255).any() else 1.0

    richest = sorted(corners, key=variety)[: (count + 1) // 2]
    rest = [corner for corner in corners if corner not in richest]
    return richest + rest[: count - len(richest)]
