"""The form of every notebook, checked without running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_form import CHECKS, anchors, colab_address, repository
from notebook_tools import NOTEBOOKS, REPO, tagged

PATH = REPO / "notebooks" / "00_small.ipynb"
SOLUTION = (
    "<details>\n<summary>Solution</summary>\n\n```python\nprint(2)\n```\n\n</details>"
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, check: str):
    notebook = nbformat.read(path, as_version=4)
    assert list(CHECKS[check](notebook, path)) == []


def test_the_course_has_its_notebooks():
    assert {"00", "02"} <= {path.name[:2] for path in NOTEBOOKS}


def test_setup_cells_are_the_same_but_for_leafmap():
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    cells = [cell.source for one in notebooks for cell in tagged(one, "setup")]
    assert len({source.replace("[maps]", "") for source in cells}) == 1


def good() -> NotebookNode:
    """A small notebook without a fault; cells are named by their position."""
    header = (
        "# 00 Small\n\n"
        f"[![Open in Colab](badge.svg)]({colab_address(PATH.name)})\n\n"
        "**Time:** T4 not measured, CPU 2 min. **Download:** 3 MB.\n\n"
        "- Load a model.\n- Train it.\n- Look at it.\n\n"
        '<img src="../docs/figures/" alt="result">'
    ).replace("badge.svg", "https://x.org/badge.svg")
    install = f'%pip install "geopeft-kit @ git+{repository()}"'
    setup = f'import sys\n\nif "google.colab" in sys.modules:\n    {install}'
    parameters = 'import os\n\nFAST = os.environ.get("GEOPEFT_FAST") == "1"\nSEED = 0'
    exercise = "### Exercise {} *\n\nDo it.\n\n" + SOLUTION
    cells = [
        new_markdown_cell(header),
        new_code_cell(setup, metadata={"tags": ["setup"]}),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell("import geopeft_kit as gk"),
        new_markdown_cell("## Why\n\n**Predict:** what will it say?"),
        new_code_cell("print(gk.load_backbone)"),
        new_markdown_cell("**Notice:** it said so. [Help](../CONTRIBUTING.md)"),
        new_code_cell("assert SEED == 0, 'run'", metadata={"tags": ["check"]}),
        new_markdown_cell("## Exercises"),
        new_markdown_cell(exercise.format(1)),
        new_markdown_cell(exercise.format(2)),
        new_code_cell("# Apache-2.0\nprint(1)", metadata={"tags": ["copyme"]}),
        new_markdown_cell("## Takeaways\n\n- One.\n\n## Sources\n\n- A paper."),
    ]
    return new_notebook(cells=cells)


def replaced(index: int, old: str, new: str) -> Callable[[NotebookNode], None]:
    """Fault: one text of one cell is another."""

    def fault(notebook: NotebookNode) -> None:
        cell = notebook.cells[index]
        assert old in cell.source, f"{old!r} is not in cell {index}: the fault is none"
        cell.source = cell.source.replace(old, new)

    return fault


def added(source: str, *tags: str, at: int = 6) -> Callable[[NotebookNode], None]:
    """Fault: one code cell more."""

    def fault(notebook: NotebookNode) -> None:
        cell = new_code_cell(source, metadata={"tags": list(tags)})
        notebook.cells.insert(at, cell)

    return fault


def moved(index: int, to: int) -> Callable[[NotebookNode], None]:
    """Fault: a cell stands elsewhere."""
    return lambda notebook: notebook.cells.insert(to, notebook.cells.pop(index))


def with_output(notebook: NotebookNode) -> None:
    notebook.cells[5].outputs = [new_output("stream", text="x")]


def with_count(notebook: NotebookNode) -> None:
    notebook.cells[5].execution_count = 1


def with_widgets(notebook: NotebookNode) -> None:
    notebook.metadata.widgets = {"state": {}}


def with_wrong_type(notebook: NotebookNode) -> None:
    notebook.cells[5].cell_type = "picture"


def with_many_cells(notebook: NotebookNode) -> None:
    notebook.cells += [new_markdown_cell("more") for _ in range(40)]


BAD: list[tuple[str, Callable[[NotebookNode], None]]] = [
    ("is_valid", with_wrong_type),
    ("name_and_title", replaced(0, "# 00 ", "# 07 ")),
    ("name_and_title", moved(0, 3)),
    ("header_content", replaced(0, "/blob/main/", "/blob/old/")),
    ("header_content", replaced(0, "T4 not measured", "T4")),
    ("header_content", replaced(0, "CPU 2 min", "soon")),
    ("header_content", replaced(0, "3 MB", "some")),
    ("header_content", replaced(0, "- Look at it.\n", "")),
    ("header_content", replaced(0, "../docs/figures/", "../docs/")),
    ("skeleton", lambda notebook: notebook.cells[7].metadata.pop("tags")),
    ("skeleton", moved(1, 9)),
    ("skeleton", moved(11, 4)),
    ("skeleton", added("x = 1", "copyme")),
    ("skeleton", replaced(3, "import geopeft_kit as gk", "import geopeft_kit")),
    ("skeleton", replaced(12, "Takeaways", "End")),
    ("skeleton", replaced(12, "Sources", "End")),
    ("skeleton", lambda notebook: notebook.cells.__delitem__(slice(8, 11))),
    ("size", with_many_cells),
    ("size", added("x = '" + "x" * 61_000 + "'")),
    ("cell_size", added("x = 1\n" * 26)),
    ("cell_size", added("x = '" + "x" * 80 + "'")),
    ("stripped", with_output),
    ("stripped", with_count),
    ("stripped", with_widgets),
    ("setup_cell", replaced(1, "geopeft-kit @", "torch geopeft-kit @")),
    ("setup_cell", replaced(1, repository(), "https://x.org")),
    ("setup_cell", replaced(1, "geopeft-kit @", "geopeft-kit[maps] @")),
    ("setup_cell", added("gk.show_map([], tools=True)")),
    ("setup_cell", replaced(1, 'if "google.colab" in sys.modules:', "if True:")),
    ("setup_cell", added("print(1)", "setup")),
    ("setup_cell", replaced(1, "    %pip", "    pass\nelse:\n    %pip")),
    ("parameters_cell", replaced(2, "SEED", "seed")),
    ("parameters_cell", replaced(2, "GEOPEFT_FAST", "QUICK")),
    ("parameters_cell", replaced(2, "SEED = 0", "SEED = 0\nprint(SEED)")),
    ("parameters_cell", added("SEED = 3")),
    ("check_cells", replaced(7, ", 'run'", "")),
    ("check_cells", replaced(7, "assert SEED == 0, 'run'", "print(SEED)")),
    ("code_parses", added("x = = 1")),
    ("code_parses", replaced(9, "print(2)", "print(2")),
    ("public_imports", added("from geopeft_kit.data import ChipData")),
    ("public_imports", added("from geopeft_kit import fit")),
    ("public_imports", added("import geopeft_kit.data")),
    ("public_imports", added("import geopeft_kit as kit")),
    ("public_imports", added("from math import *")),
    ("public_imports", added("gk.nobody()")),
    ("public_imports", replaced(9, "print(2)", "gk.nobody()")),
    ("no_tricks", added("import sys\nsys.path.append('..')")),
    ("no_tricks", added("import warnings\nwarnings.filterwarnings('ignore')")),
    ("links", replaced(6, "../CONTRIBUTING.md", "../NOTHING.md")),
    ("links", replaced(6, "../CONTRIBUTING.md", "../CONTRIBUTING.md#no-such-heading")),
    ("links", replaced(6, "../CONTRIBUTING.md", repository() + "/blob/main/NO.md")),
    ("exercises", replaced(9, "<details>", "<p>")),
    ("exercises", replaced(9, "<details>", "<details open>")),
    ("exercises", replaced(9, "<summary>Solution</summary>", "")),
    ("exercises", lambda notebook: notebook.cells.pop(9)),
    ("predict_and_notice", replaced(4, "**Predict:**", "")),
    ("predict_and_notice", replaced(6, "**Notice:**", "")),
    ("copyme_has_licence", replaced(11, "# Apache-2.0", "# mine")),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_good_notebook_passes(check: str):
    assert list(CHECKS[check](good(), PATH)) == []


@pytest.mark.parametrize(("check", "fault"), BAD)
def test_a_fault_is_found(check: str, fault: Callable[[NotebookNode], None]):
    notebook = copy.deepcopy(good())
    fault(notebook)
    assert list(CHECKS[check](notebook, PATH)) != []


def test_a_bad_file_name_is_found():
    assert list(CHECKS["name_and_title"](good(), PATH.with_name("small.ipynb"))) != []


def test_every_check_has_a_failing_example():
    assert {check for check, _ in BAD} == set(CHECKS)


def test_anchors_are_those_of_github():
    text = "# One `two`: three\n\n<a id='four'></a>\n## CUDA out of memory"
    assert anchors(text) == {"one-two-three", "four", "cuda-out-of-memory"}
