"""`check_data`: each fault that is planted is found, a sound data set passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.transform import from_origin

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder

HLS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
INFO: dict[str, Any] = {
    "name": "Toy",
    "task": "segmentation",
    "bands": HLS,
    "classes": ["dry", "water"],
    "scale": 1e-4,
}


def sound_chips() -> list[Chip]:
    """Twelve chips of three regions, far from each other, with all splits."""
    chips = []
    for number in range(12):
        rng = np.random.default_rng(number)
        split = ["train", "val", "test"][number // 4]
        place = from_origin(3e5 + 5e3 * number, 5e6, 10, 10)
        image = rng.integers(100, 4000, (6, 16, 16)).astype(np.uint16)
        chips.append(
            Chip(
                f"c{number}", image, rng.integers(0, 2, (16, 16)), split=split,
                region="abc"[number // 4], crs="EPSG:32633", transform=place,
            )
        )  # fmt: skip
    return chips


def report(folder: Path, chips: list[Chip], **facts: Any):
    return gk.check_data(write_chip_folder(folder / "toy", chips, INFO | facts))


def test_a_sound_data_set_passes(tmp_path: Path) -> None:
    found = report(tmp_path, sound_chips())
    assert found.ok and found.table.empty
    assert "nothing found" in found._repr_html_() and "nothing found" in repr(found)
    assert len(found.chips) == 12
    np.testing.assert_allclose(found.classes.sum(), 1)
    assert list(found.classes) == ["train", "val", "test"]
    assert found.bands["median"].between(0.1, 0.3).all()


def nothing_learned(chips: list[Chip]) -> None:
    chips[2].mask = np.full((16, 16), 255)


def one_colour(chips: list[Chip]) -> None:
    chips[3].image = np.full((6, 16, 16), 700, np.uint16)


def other_size(chips: list[Chip]) -> None:
    chips[1].image, chips[1].mask = chips[1].image[:, :8], chips[1].mask[:8]


def no_place(chips: list[Chip]) -> None:
    chips[4].crs = chips[4].transform = None


def twins(chips: list[Chip]) -> None:
    chips[9].image = chips[1].image.copy()


def twins_of_one_split(chips: list[Chip]) -> None:
    chips[2].image = chips[1].image.copy()


def same_ground(chips: list[Chip]) -> None:
    chips[8].transform = from_origin(3e5 + 50, 5e6, 10, 10)


def side_by_side(chips: list[Chip]) -> None:
    chips[8].transform = from_origin(3e5 + 160, 5e6, 10, 10)


def val_beside_train(chips: list[Chip]) -> None:
    chips[4].transform = from_origin(3e5 + 160, 5e6, 10, 10)


def no_water_in_test(chips: list[Chip]) -> None:
    for chip in chips[8:]:
        chip.mask = np.zeros((16, 16), int)


def black_border(chips: list[Chip]) -> None:
    chips[5].image[:, :4] = 0


def another_scale(chips: list[Chip]) -> None:
    chips[6].image = (chips[6].image // 100).astype(np.uint16)


def odd_split(chips: list[Chip]) -> None:
    for chip in chips[4:8]:
        chip.split = "validation"


@pytest.mark.parametrize(
    ("spoil", "check", "level", "chip"),
    [
        (nothing_learned, "empty chips", "warning", "c2"),
        (one_colour, "empty chips", "warning", "c3"),
        (other_size, "sizes", "warning", "c1"),
        (no_place, "CRS", "warning", "c4"),
        (twins, "duplicates", "error", "c9"),
        (twins_of_one_split, "duplicates", "note", "c2"),
        (same_ground, "neighbours", "error", "c8"),
        (side_by_side, "neighbours", "warning", "c8"),
        (val_beside_train, "neighbours", "warning", "c4"),
        (no_water_in_test, "class balance", "warning", None),
        (black_border, "nodata", "warning", "c5"),
        (another_scale, "reflectance", "warning", "c6"),
        (odd_split, "splits", "warning", "c4"),
    ],
)
def test_a_planted_fault_is_found(
    tmp_path: Path, spoil: Any, check: str, level: str, chip: str | None
) -> None:
    chips = sound_chips()
    spoil(chips)
    found = report(tmp_path, chips)
    (finding,) = [f for f in found.findings if f.check == check]
    assert finding.level == level
    assert chip is None or chip in finding.chips
    assert finding.next.endswith((".", "?"))
    assert {f.check for f in found.findings} <= {check, "class balance"}
    assert finding.found in repr(found)


@pytest.mark.parametrize(("scale", "proposed"), [(1.0, "0.0001"), (1e-7, "0.0001")])
def test_a_wrong_scale_is_asked_about_and_not_changed(
    tmp_path: Path, scale: float, proposed: str
) -> None:
    found = report(tmp_path, sound_chips(), scale=scale)
    finding = found.findings[0]
    assert (finding.check, finding.level) == ("reflectance", "error")
    assert f"perhaps it is scale={proposed}" in finding.next
    assert gk.ChipData(tmp_path / "toy", split="index").info.scale == scale


def test_buffers_splits_of_chip_data_and_nodata(tmp_path: Path) -> None:
    chips = sound_chips()
    for chip in chips:
        chip.split = None
        chip.image[:, 0] = 9
    folder = write_chip_folder(tmp_path / "toy", chips, INFO | {"nodata": 9})
    assert {f.check for f in gk.check_data(folder).findings} == {"splits", "nodata"}
    data = gk.ChipData(folder, test_regions=["b"])
    assert "neighbours" not in set(gk.check_data(data).table["check"])
    near = gk.check_data(data, buffer_m=6000).table
    assert "are within 6000 m" in near[near["check"] == "neighbours"]["found"].iloc[0]
    assert gk.check_data(data).chips["nodata"].tolist() == [1 / 16] * 12


def test_broken_files_are_findings_and_text_is_escaped(tmp_path: Path) -> None:
    folder = write_chip_folder(
        tmp_path / "toy", sound_chips(), INFO | {"name": "<script>alert(1)</script>"}
    )
    path = folder / "images/c7.tif"
    path.write_bytes(path.read_bytes()[:600])
    found = gk.check_data(folder)
    assert found.findings[0].check == "files" and found.findings[0].chips == ["c7"]
    html = found._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_pictures_for_every_task(tmp_path: Path) -> None:
    figure = report(tmp_path, sound_chips()).plot()
    assert all(axis.get_xlabel() for axis in figure.axes)
    chips = sound_chips()
    for chip in chips:
        chip.mask = np.random.default_rng(0).random((16, 16))
        chip.crs = chip.transform = None
    facts = {"task": "regression", "classes": []}
    other = report(tmp_path / "r", chips, **facts)
    assert other.classes.empty and len(other.plot().axes) == 4
    for number, chip in enumerate(chips):
        chip.mask, chip.label = None, number % 2
    one = report(tmp_path / "l", chips, task="classification")
    assert one.classes.loc["water", "test"] == 0.5
    one.plot()


def test_a_plain_folder_is_sent_to_from_pairs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="from_pairs"):
        gk.check_data(tmp_path)
