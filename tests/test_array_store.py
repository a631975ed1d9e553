"""A store of arrays: written whole or not at all, its rows checked when read."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from geopeft_kit.array_store import INDEX, ArrayStore

IMAGE = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
LABEL = np.array([3, 1, 4, 1], np.uint8)


def parts() -> Iterator[dict[str, np.ndarray]]:
    for start in (0, 1, 3):
        rows = slice(start, {0: 1, 1: 3, 3: 4}[start])
        yield {"image": IMAGE[rows], "label": LABEL[rows]}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(content)


def test_rows_and_facts_come_back(tmp_path: Path) -> None:
    store = ArrayStore.write(tmp_path / "a", parts(), 4, [1.5, [2, "x"]])
    again = pickle.loads(pickle.dumps(ArrayStore(tmp_path / "a")))
    for one in (store, again):
        assert one.facts == [1.5, [2, "x"]]
        assert np.array_equal(one.row(2)["image"], IMAGE[2])
        assert one.row(2)["label"] == 4
        assert np.array_equal(one.whole()["image"], IMAGE)


def test_an_existing_store_is_used(tmp_path: Path) -> None:
    ArrayStore.write(tmp_path / "a", parts(), 4)
    assert ArrayStore.write(tmp_path / "a", iter(()), 4).row(0)["label"] == 3


@pytest.mark.parametrize("position", [-1, -20, 130])
def test_a_damaged_row_is_noticed_and_the_others_serve(
    tmp_path: Path, position: int
) -> None:
    ArrayStore.write(tmp_path / "a", parts(), 4)
    flip(tmp_path / "a" / "image.npy", position)
    store = ArrayStore(tmp_path / "a")
    damaged = 0 if position > 0 else 3
    store.row(1)
    with pytest.raises(RuntimeError, match=f"row {damaged} of image.npy .* damaged"):
        store.row(damaged)
    with pytest.raises(RuntimeError, match="Delete this folder"):
        store.whole()


def test_a_file_that_is_read_otherwise_is_noticed(tmp_path: Path) -> None:
    """The same bytes, as another type or shape."""
    for other in (IMAGE.view(np.int32), IMAGE.reshape(4, 3, 2)):
        store = ArrayStore.write(tmp_path / "a", parts(), 4)
        np.save(tmp_path / "a" / "image.npy", other)
        store = ArrayStore(tmp_path / "a")
        with pytest.raises(RuntimeError, match="row 1 of image.npy"):
            store.row(1)


def test_a_damaged_index_or_a_cut_file_is_noticed(tmp_path: Path) -> None:
    ArrayStore.write(tmp_path / "a", parts(), 4, ["facts"])
    text = (tmp_path / "a" / INDEX).read_text()
    (tmp_path / "a" / INDEX).write_text(text.replace('facts"]', 'other"]'))
    with pytest.raises(RuntimeError, match="index.json"):
        ArrayStore(tmp_path / "a")
    (tmp_path / "a" / INDEX).write_text(text)
    (tmp_path / "a" / "label.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RuntimeError, match=r"label\.npy"):
        ArrayStore(tmp_path / "a")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def full() -> Iterator[dict[str, np.ndarray]]:
        yield {"image": IMAGE[:1]}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ArrayStore.write(tmp_path / "stores" / "a", full(), 4)
    assert list(tmp_path.iterdir()) == []
