"""`cards.toml`: an entry says what differs from another, and mistakes are named."""

from __future__ import annotations

import copy
import re
import tomllib
from typing import Any

import pytest
from notebook_tools import REPO

from geopeft_kit.backbones.cards import CARDS, PATH, STATISTICS, read_cards

CONTENT = tomllib.loads(PATH.read_text(encoding="utf-8"))


def read(**entries: dict[str, Any]) -> Any:
    """The cards with further entries at the end."""
    content = copy.deepcopy(CONTENT)
    content["card"] |= entries
    return read_cards(content, STATISTICS)


def test_another_size_is_one_entry() -> None:
    sizes = {"width": 1408, "depth": 40, "parameters": 1_000_000_000}
    card = read(clay_huge={"like": "clay_v1_5", **sizes})["clay_huge"]
    parent = CARDS["clay_v1_5"]
    assert (card.width, card.depth, card.parameters) == tuple(sizes.values())
    same = ("bands", "normalisation", "weights", "notes", "also_reads", "architecture")
    assert all(getattr(card, name) == getattr(parent, name) for name in same)


def test_architecture_is_merged_and_the_parent_stays() -> None:
    entry = {"like": "clay_v1", "architecture": {"waves": {"VV": 3.5}}}
    card = read(other=entry)["other"]
    parent = CARDS["clay_v1"].architecture
    assert card.architecture["waves"] == parent["waves"] | {"VV": 3.5}
    assert card.architecture["heads"] == parent["heads"]
    assert "VV" not in parent["waves"]


def test_a_stretch_of_two_spreads() -> None:
    entry = {"like": "galileo_nano", "two_spreads": False}
    plain = read(other=entry)["other"].normalisation
    stretched = CARDS["galileo_nano"].normalisation
    for mean, std, low, width in zip(
        plain.mean, plain.std, stretched.mean, stretched.std, strict=True
    ):
        assert (low, low + width) == pytest.approx((mean - 2 * std, mean + 2 * std))


def test_further_bands_have_the_statistics_of_the_nearest() -> None:
    further = CARDS["dofa_base"].also_reads
    known = STATISTICS["ssl4eo_s12_sentinel2"].bands
    assert further["PAN"] == known["GREEN"]  # 0.59 um; RED is at 0.66
    assert further["TIR_1"] == (0.0, 1e4), "a temperature is passed on"
    assert "TIR_1" not in CARDS["clay_v1"].also_reads


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"like": "clay_v1", "colour": 1}, r"'x': unknown fields \['colour'\]"),
        ({"family": "clay"}, r"missing fields \['depth', 'image_size'.*'statistics'"),
        ({"like": "clay_v9"}, "'clay_v9', which is not above it"),
        ({"like": "clay_v1", "statistics": "mars"}, "no 'mars'"),
        ({"like": "clay_v1", "bands": ["RED", "PAN"]}, "no 'PAN'"),
        ({"like": "clay_v1", "weights": {"default": "best"}}, "no 'best'"),
        ({"like": "clay_v1", "weights": {"default": {"link": ""}}}, "'x'.*'link'"),
    ],
)
def test_mistakes_are_named(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(x=entry)


def test_the_examples_of_contributing_are_real() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text()
    section = text.split("## Add a backbone")[1].split("\n## ")[0]
    examples = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    files = (PATH, PATH.with_name("ssl4eo.py"), REPO / "tests" / "backbone_table.py")
    for example, file in zip(examples, files, strict=True):
        lines = [line.removeprefix("+") for line in example.splitlines()]
        assert "\n".join(lines) in file.read_text(), file
