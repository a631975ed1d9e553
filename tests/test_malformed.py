"""Files that are damaged by chance: a clear error or a clean read, never a crash.

Thousands of seeded mutations of rasters, masks, index and facts. An error has to be one
that users can act on (ValueError, RuntimeError or OSError, naming chip or file); where
none is raised, what was read has the right shapes and types.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rasterio.transform import from_origin

from geopeft_kit.data import Chip, ChipData, read_chip_folder, write_chip_folder
from geopeft_kit.data.folder import FACTS
from geopeft_kit.data.index import INDEX

SIZE = 16
KIND = (ValueError, RuntimeError, OSError)
INFO: dict[str, Any] = {
    "name": "Toy",
    "task": "segmentation",
    "bands": ("RED", "GREEN"),
    "classes": ["dry", "water"],
    "scale": 1e-4,
}


def write_toy(folder: Path) -> Path:
    """A small folder with georeference and masks."""
    draw = np.random.default_rng(0)
    chips = [
        Chip(
            f"chip_{i}",
            draw.integers(1, 4000, (2, SIZE, SIZE)).astype(np.uint16),
            draw.integers(0, 2, (SIZE, SIZE)),
            region="ab"[i % 2],
            split=("train", "val", "test")[i % 3],
            crs="EPSG:32633",
            transform=from_origin(3e5 + 1e4 * i, 5e6, 10, 10),
            date="2024-05-01",
        )
        for i in range(6)
    ]
    return write_chip_folder(folder, chips, INFO)


def write_pictures(folder: Path) -> Path:
    """PNG images as they are, with labels."""
    chips = []
    for i in range(4):
        path = folder.parent / f"{i}.png"
        noise = np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3))
        Image.fromarray(noise.astype(np.uint8)).save(path)
        chips.append(Chip(f"p{i}", path, label=i % 2, split=("train", "test")[i % 2]))
    info = INFO | {"task": "classification", "bands": "rgb"}
    return write_chip_folder(folder, chips, info)


def mutate(content: bytes, draw: np.random.Generator) -> bytes:
    """Damage bytes: flips, cuts, insertions, blanks, shuffled blocks, nothing left."""
    data = bytearray(content)
    # half of the damage falls into the header, where it does most
    span = len(data) if draw.random() < 0.5 else min(len(data), 400)
    at = int(draw.integers(span))
    kind = draw.integers(8)
    if kind <= 2:
        for _ in range(int(draw.integers(1, 9))):
            data[int(draw.integers(span))] ^= 1 << int(draw.integers(8))
    elif kind == 3:
        data[at : at + 8] = draw.bytes(8)
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data[at:at] = draw.bytes(int(draw.integers(1, 40)))
    elif kind == 6:
        data[at : at + int(draw.integers(1, 64))] = bytes(16)
    else:
        del data[at : at + int(draw.integers(1, 64))]
    return bytes(data)


def read_all(data: ChipData) -> None:
    """Read every chip, and look at what comes."""
    for split in data.splits:
        for sample in data.dataset(split):
            image = sample["image"]
            assert image.dtype == torch.float32
            assert image.shape == (len(data.bands), SIZE, SIZE)
            assert torch.isfinite(image).all()
            if "mask" in sample:
                assert sample["mask"].shape == (SIZE, SIZE)
                assert set(sample["mask"].unique().tolist()) <= {0, 1, 255}
            if "label" in sample:
                assert int(sample["label"]) in (0, 1)


def tolerated(action: Callable[[], None]) -> str:
    """Run; "" where it went well, else the message of an error that users can read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except KIND as error:
        assert len(str(error)) > 20, f"{error!r} does not say what to do"
        return str(error)
    return ""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_toy, "images/chip_0.tif"),
        (write_toy, "masks/chip_0.tif"),
        (write_pictures, "images/p0.png"),
    ],
    ids=["image", "mask", "picture"],
)
def test_damaged_rasters(
    write: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "data")
    data = ChipData(folder, split="index", cache=False)
    path = folder / name
    content = path.read_bytes()
    draw = np.random.default_rng(len(name))
    failed = 0
    for _ in range(500):
        path.write_bytes(mutate(content, draw))
        message = tolerated(lambda: read_all(data))
        failed += bool(message)
        assert not message or path.stem in message, message
    assert failed > 50, "the damage does no harm: the test tests nothing"
    path.write_bytes(content)
    read_all(data)


@pytest.mark.slow
def test_damaged_rasters_are_not_written_into_a_folder(toy: Path) -> None:
    content = (toy / "images/chip_0.tif").read_bytes()
    source, target = toy.parent / "mine.tif", toy.parent / "new"
    draw = np.random.default_rng(1)
    for _ in range(150):
        source.write_bytes(mutate(content, draw))
        chips = [Chip("a", source, np.zeros((SIZE, SIZE), int))]
        if tolerated(lambda chips=chips: write_chip_folder(target, chips, INFO)):
            assert not target.exists(), "something is left half-written"
        else:
            assert len(read_chip_folder(target)[1]) == 1
            for path in sorted(target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.rmdir()


@pytest.mark.slow
def test_a_damaged_index_is_noticed(toy: Path) -> None:
    content = (toy / INDEX).read_bytes()
    draw = np.random.default_rng(2)
    for _ in range(150):
        damaged = mutate(content, draw)
        (toy / INDEX).write_bytes(damaged)
        message = tolerated(lambda: read_all(ChipData(toy)))
        assert INDEX in message or damaged == content


@pytest.mark.slow
def test_a_damaged_index_with_a_good_hash(toy: Path) -> None:
    """The same, with the hash made to fit, so that the parquet reader meets it."""
    content, facts = (toy / INDEX).read_bytes(), json.loads((toy / FACTS).read_text())
    draw = np.random.default_rng(3)
    for _ in range(250):
        sign(toy, mutate(content, draw), facts)
        tolerated(lambda: read_all(ChipData(toy, split="index")))


def sign(folder: Path, index: bytes, facts: dict[str, Any]) -> None:
    (folder / INDEX).write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    (folder / FACTS).write_text(json.dumps(facts | {"chips_sha256": digest}))


WRONG: tuple[Any, ...] = (
    None, -1, 0, 3.5, float("nan"), 10**9, "", "x", "../../etc/passwd", "/etc/passwd",
    [], [1], {}, True, "train", "images/chip_1.tif", "a" * 300, "\0", "é",
)  # fmt: skip


@pytest.mark.slow
def test_wrong_cells_of_the_index(toy: Path) -> None:
    facts = json.loads((toy / FACTS).read_text())
    index = gpd.read_parquet(toy / INDEX)
    draw = np.random.default_rng(4)
    columns = [c for c in index if c != "geometry"]
    for _ in range(250):
        table = pd.DataFrame(index.drop(columns="geometry")).astype(object)
        for _ in range(int(draw.integers(1, 3))):
            column = columns[int(draw.integers(len(columns)))]
            value = WRONG[int(draw.integers(len(WRONG)))]
            rows = [int(draw.integers(len(table)))] if draw.random() < 0.7 else range(6)
            for row in rows:
                table.at[row, column] = value
        if draw.random() < 0.15:
            table = table.drop(columns=columns[int(draw.integers(len(columns)))])
        buffer = io.BytesIO()
        try:
            frame = gpd.GeoDataFrame(table, geometry=index.geometry)
            frame.to_parquet(buffer, index=False)
        except Exception:
            continue
        sign(toy, buffer.getvalue(), facts)
        tolerated(lambda: read_all(ChipData(toy, split="index")))


def changed(value: Any, draw: np.random.Generator) -> Iterator[Any]:
    """Facts with one value anywhere replaced, doubled or left out."""
    names = list(value)
    name = names[int(draw.integers(len(names)))]
    wrong = WRONG[int(draw.integers(len(WRONG)))]
    yield {k: v for k, v in value.items() if k != name}
    yield value | {name: wrong}
    yield value | {name: [wrong, wrong]}
    yield value | {str(wrong): wrong}
    if isinstance(value[name], list) and value[name]:
        yield value | {name: value[name][:-1]}
        yield value | {name: value[name] * 2}


@pytest.mark.slow
def test_wrong_facts(toy: Path) -> None:
    content = (toy / FACTS).read_text()
    facts = json.loads(content)
    draw = np.random.default_rng(5)
    tried = 0
    for _ in range(60):
        for values in changed(facts, draw):
            (toy / FACTS).write_text(json.dumps(values))
            tolerated(lambda: read_all(ChipData(toy, split="index")))
            tried += 1
    for _ in range(150):
        (toy / FACTS).write_bytes(mutate(content.encode(), draw))
        tolerated(lambda: read_all(ChipData(toy, split="index")))
    assert tried > 200


def test_a_few_mutations_every_day(toy: Path, pictures: Path) -> None:
    for folder, name in ((toy, "images/chip_0.tif"), (pictures, "images/p0.png")):
        data = ChipData(folder, split="index", cache=False)
        content = (folder / name).read_bytes()
        draw = np.random.default_rng(6)
        messages = set()
        for _ in range(20):
            (folder / name).write_bytes(mutate(content, draw))
            messages.add(tolerated(lambda data=data: read_all(data)))
        assert any(Path(name).stem in message for message in messages)
