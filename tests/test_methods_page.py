"""The pages are what their script writes today, and say what the tests know."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from method_table import ROWS
from notebook_tools import REPO

import geopeft_kit as gk
from geopeft_kit.methods.base import linear_only

# The kind of backbone in the table of the tests -> the column of the page.
COLUMNS = {
    "fused": "ViT",
    "split": "Galileo",
    "swin": "Swin",
    "convnext": "ConvNeXt",
    "resnet": "ResNet",
}
# Kinds of layer that the tests' small networks lack, and the page's have.
LARGER_ONLY = dict.fromkeys(linear_only(), "convnext") | {"oft": "resnet"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = REPO / "docs" / "write_methods.py"
    spec = importlib.util.spec_from_file_location("write_methods", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tool: ModuleType) -> str:
    return tool.page()


def test_the_pages_are_up_to_date(tool: ModuleType) -> None:
    for path, text in tool.pages().items():
        assert path.read_text() == text, "run: python docs/write_methods.py"


def test_every_method_stands_in_every_table(page: str) -> None:
    for title in ("What each one trains", "Which method serves", "Options"):
        _, _, rest = page.partition(f"\n## {title}")
        section = rest.partition("\n## ")[0]
        names = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
        assert names == [card.name for card in gk.list_methods()], title
        widths = {
            len(re.findall(r"(?<!\\)\|", line))
            for line in section.splitlines()
            if line.startswith("|")
        }
        assert len(widths) == 1, title  # no cell was cut in two


def test_the_page_serves_whom_the_tests_serve(page: str) -> None:
    header = "| method | " + " | ".join(COLUMNS.values()) + " |"
    assert header in page
    table = page.partition(header)[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        name, *words = (cell.strip("` ") for cell in line.strip("|").split("|"))
        served = {kind for row in ROWS if row.name == name for kind in row.serves}
        if name in LARGER_ONLY:
            assert LARGER_ONLY[name] not in served
            served.add(LARGER_ONLY[name])
        assert words == ["yes" if kind in served else "no" for kind in COLUMNS], name


def test_every_no_has_its_reason(page: str) -> None:
    reasons = dict.fromkeys(COLUMNS.values(), 0)
    for kinds in re.findall(r"^- `\w+`, ([^:]+): .+\.$", page, re.MULTILINE):
        for kind in kinds.split(", "):
            reasons[kind] += 1
    table = page.partition("\n| method | ViT")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|")[1:] for line in table.splitlines()[2:]]
    for number, kind in enumerate(reasons):
        assert sum(row[number].strip() == "no" for row in rows) == reasons[kind], kind
    assert sum(reasons.values()) > 10


@pytest.mark.parametrize("number", [0, 1])
def test_the_worked_example_is_in_the_code(number: int) -> None:
    text = (REPO / "CONTRIBUTING.md").read_text()
    section = text.partition("## Add a method")[2].partition("\n## ")[0]
    diff = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)[number]
    added = "".join(line[1:] + "\n" for line in diff.splitlines())
    paths = ("geopeft_kit/methods/peft/table.py", "tests/method_table.py")
    assert added in (REPO / paths[number]).read_text()
