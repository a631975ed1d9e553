"""docs/compatibility.md names every backbone and method, and says what they say."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from notebook_tools import REPO

import geopeft_kit as gk
from geopeft_kit.decoders import DECODERS

PATH = REPO / "docs" / "write_compatibility.py"
# One card a layout: small enough to ask in every run.
ASKED = ("geopeft_tiny", "galileo_nano", "satlas_swin_v2_t", "decur_resnet50")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_compatibility", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(tool: ModuleType) -> str:
    return tool.PAGE.read_text(encoding="utf-8")


def rows(page: str, title: str) -> tuple[list[str], dict[str, list[str]]]:
    """Heads of the columns, and backbone -> cells, of the table below a title."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[c.strip(" `") for c in line.strip("|").split("|")] for line in lines]
    return cells[0][1:], {first: rest for first, *rest in cells[2:]}


def reasons(page: str) -> dict[str, str]:
    """Number -> reason."""
    found = re.findall(r'^- <a id="reason-(\d+)"></a>\*\*(\d+)\*\* (.+)\.$', page, re.M)
    assert all(anchor == shown for anchor, shown, _ in found)
    return {number: text for number, _, text in found}


@pytest.mark.parametrize(
    ("title", "heads"),
    [
        ("Backbone and method", [card.name for card in gk.list_methods()]),
        ("Backbone and decoder", ["maps", *DECODERS]),
    ],
)
def test_the_page_names_all(
    tool: ModuleType, committed: str, title: str, heads: list[str]
) -> None:
    columns, table = rows(committed, title)
    assert columns == heads, "run: python docs/write_compatibility.py"
    names = [card.name for card in gk.list_backbones()]
    assert list(table) == [*names, *tool.TIMM], (
        "run: python docs/write_compatibility.py"
    )
    assert {len(cells) for cells in table.values()} == {len(heads)}


def test_every_no_has_its_reason(committed: str) -> None:
    _, table = rows(committed, "Backbone and method")
    words = {word for cells in table.values() for word in cells} - {"yes"}
    assert all(re.fullmatch(r"\[(\d+)\]\(#reason-\1\)", word) for word in words)
    assert {word[1 : word.index("]")] for word in words} == set(reasons(committed))


@pytest.mark.parametrize("name", ASKED)
def test_a_row_is_what_the_methods_say(
    tool: ModuleType, committed: str, name: str
) -> None:
    backbone = tool.load(name)
    numbers: dict[str, int] = {}
    now = list(tool.method_cells(backbone, numbers))
    said = {f"[{n}](#reason-{n})": text for text, n in numbers.items()}
    page = {f"[{n}](#reason-{n})": text for n, text in reasons(committed).items()}
    _, table = rows(committed, "Backbone and method")
    assert [page.get(c, c) for c in table[name]] == [said.get(c, c) for c in now]
    assert "yes" in now and len(set(now)) > 1  # the page is no wall of yes
    _, table = rows(committed, "Backbone and decoder")
    assert table[name] == list(tool.decoder_cells(backbone))


@pytest.mark.parametrize("name", ["timm:convnext_atto", "galileo_nano"])
def test_a_yes_attaches_with_default_options(tool: ModuleType, name: str) -> None:
    backbone, served = tool.load(name), []
    for card in gk.list_methods():
        if card.why_not(backbone) is None:
            gk.attach(backbone, card.name).detach()
            served.append(card.name)
    assert {"lora", "oft", "boft", "houlsby"} <= set(served)


@pytest.mark.slow
def test_the_page_is_up_to_date(tool: ModuleType, committed: str) -> None:
    assert committed == tool.page(), "run: python docs/write_compatibility.py"
