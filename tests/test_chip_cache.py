"""Packed chips: the same samples from one file, named after what it was made from."""

from __future__ import annotations

import gc
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from test_data import INFO, mask, toy_chips

import geopeft_kit as gk
from geopeft_kit import files
from geopeft_kit.data import write_chip_folder


def assert_same(a: gk.ChipData, b: gk.ChipData) -> None:
    for split in a.splits:
        one, two = a.dataset(split), b.dataset(split)
        assert len(one) == len(two)
        for i in range(len(one)):
            left, right = one[i], two[i]
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == right[key].dtype
                    torch.testing.assert_close(
                        value, right[key], rtol=0, atol=0, equal_nan=True
                    )
                else:
                    assert value == right[key]


def holed() -> list[Any]:
    chips = list(toy_chips())
    chips[2].image[:, 3:6] = 9999
    return chips


@pytest.mark.parametrize(
    ("facts", "chips"),
    [
        ({}, toy_chips()),
        ({"nodata": 9999}, holed()),
        ({"ignore_index": -1}, toy_chips()),
        ({"task": "regression", "classes": ()}, toy_chips(mask=np.eye(16) * 0.5)),
        ({"task": "classification"}, toy_chips(mask=None, label="water")),
    ],
)  # fmt: skip
def test_packed_samples_are_the_same(tmp_path: Path, facts: dict, chips: Any) -> None:
    folder = write_chip_folder(tmp_path / "toy", chips, INFO | facts)
    plain = gk.ChipData(folder, test_regions=["b"], cache=False)
    packed = gk.ChipData(folder, test_regions=["b"])
    place = packed.cache(tmp_path / "packs")
    shutil.move(folder / "images", tmp_path / "away")
    assert packed.dataset("test")[0]["image"].shape == (6, 16, 16)
    shutil.move(tmp_path / "away", folder / "images")
    assert_same(plain, packed)
    assert place.parent == tmp_path / "packs"
    assert packed.cache(tmp_path / "packs") == place
    assert [p.name for p in (tmp_path / "packs").iterdir()] == [place.name]


def test_bands_subsets_and_augmentation(tmp_path: Path) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    given = {"bands": ["SWIR_1", "RED"], "test_regions": ["a"], "augment": True}
    plain, packed = gk.ChipData(folder, **given), gk.ChipData(folder, **given)
    packed.cache(tmp_path / "packs")
    small, other = plain.subset(4), packed.subset(4)
    assert other.dataset("train").table.packed is not None
    for a, b in zip(small.train_dataloader(), other.train_dataloader(), strict=True):
        assert torch.equal(a["image"], b["image"]) and a["chip"] == b["chip"]


def test_a_pack_cannot_go_stale(tmp_path: Path) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    data = gk.ChipData(folder, test_regions=["b"])
    first = data.cache(tmp_path / "packs")
    path = folder / "masks/b_0.tif"
    with rasterio.open(path, "r+") as file:
        file.write(1 - mask(100).astype(np.uint8), 1)
    again = gk.ChipData(folder, test_regions=["b"])
    second = again.cache(tmp_path / "packs")
    assert first != second
    assert torch.equal(again.dataset("test")[0]["mask"], torch.tensor(1 - mask(100)))
    other = gk.ChipData(folder, bands=["RED"], test_regions=["b"])
    assert other.cache(tmp_path / "packs") not in (first, second)


def test_a_damaged_pack_is_noticed_and_the_files_are_read(tmp_path: Path) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    plain = gk.ChipData(folder, test_regions=["b"])
    pack = gk.ChipData(folder, test_regions=["b"]).cache(tmp_path / "packs")
    content = bytearray((pack / "image.npy").read_bytes())
    content[200:] = bytes(len(content) - 200)
    (pack / "image.npy").write_bytes(content)
    packed = gk.ChipData(folder, test_regions=["b"])
    packed.cache(tmp_path / "packs")
    with pytest.warns(UserWarning, match=r"image\.npy .* was damaged"):
        assert_same(plain, packed)


def test_a_worker_maps_the_file_itself(tmp_path: Path) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    data = gk.ChipData(folder, test_regions=["b"])
    data.cache(tmp_path / "packs")
    dataset = data.dataset("test")
    expected = dataset[0]["image"]
    text = pickle.dumps(dataset.table.packed)
    assert len(text) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], expected)


def test_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    data = gk.ChipData(folder, test_regions=["b"])
    before = data.dataset("test")[0]["image"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match=r"No space left.*cache\(folder="):
            data.cache(tmp_path / "packs")
    assert not (tmp_path / "packs").exists()
    assert torch.equal(data.dataset("test")[0]["image"], before)


def test_chips_of_two_sizes_cannot_be_packed(tmp_path: Path) -> None:
    chips = list(toy_chips())
    chips[3].image, chips[3].mask = chips[3].image[:, :8], chips[3].mask[:8]
    folder = write_chip_folder(tmp_path / "toy", chips, INFO)
    data = gk.ChipData(folder, test_regions=["b"])
    with pytest.raises(ValueError, match="6 x 8 x 16 uint16 as its image.*cut them"):
        data.cache(tmp_path / "packs")
    assert not (tmp_path / "packs").exists()


@pytest.mark.slow
def test_packed_epochs_are_fast_and_keep_nothing(tmp_path: Path) -> None:
    """Processor time, so that other work on the machine does not count."""
    noise = np.random.default_rng(0).integers(1, 4000, (6, 224, 224)).astype(np.uint16)
    chips = toy_chips(20, image=noise, mask=np.zeros((224, 224), int))
    folder = write_chip_folder(tmp_path / "toy", chips, INFO)
    data = gk.ChipData(folder, split="random", val_fraction=0, cache=False)

    def epoch() -> float:
        start = time.process_time()
        for _ in loader:
            pass
        return time.process_time() - start

    loader = data.dataloader("train")
    decoded = min(epoch() for _ in range(2))
    data.cache(tmp_path / "packs")
    loader = data.dataloader("train")
    assert min(epoch() for _ in range(6)) < decoded / 2
    tracemalloc.start()
    try:
        before = kept_bytes()
        epoch()
        assert kept_bytes() - before < noise.nbytes, "less than one of the sixty chips"
    finally:
        tracemalloc.stop()


def kept_bytes() -> int:
    """Bytes of the arrays and tensors that live; mapped files are not among them.

    Counted by object: the size of the process also moves with the allocator.
    """
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    arrays, _ = tracemalloc.get_traced_memory()
    return arrays + sum(storage.nbytes() for storage in storages.values())
