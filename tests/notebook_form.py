"""The form of a notebook: one small check a rule, each a list of faults in words.

`test_notebooks_form.py` applies them to the course, and proves on a small bad
notebook that each of them can fail.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from notebook_tools import REPO, solutions, tagged, tags

import geopeft_kit as gk

MAX_CELLS, MAX_BYTES, MAX_LINES, MAX_WIDTH, MAX_COPYME = 44, 60 * 1024, 25, 78, 40
NOT_IN_SETUP = "torch torchvision numpy pandas ipykernel ipywidgets ipython".split()
LINK = re.compile(r"""\]\(\s*([^)\s]+)[^)]*\)|(?:href|src)\s*=\s*["']([^"']+)["']""")
MINUTES = r"(?:\d+(?:\.\d+)?\s*(?:min|s)\b|not measured)"

Check = Callable[[NotebookNode, Path], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Add a check to the table under its own name."""
    CHECKS[function.__name__] = function
    return function


@lru_cache
def repository() -> str:
    """Address of the repository, from the one place that holds it."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].rstrip("/")


def colab_address(name: str) -> str:
    """Address that opens a notebook of the default branch in Colab."""
    place = repository().removeprefix("https://github.com/")
    return (
        f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}"
    )


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook: NotebookNode) -> str:
    """All markdown text."""
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def parse(source: str) -> ast.Module:
    """Syntax tree of a cell, magics turned into calls first."""
    return ast.parse(TransformerManager().transform_cell(source))


def trees(notebook: NotebookNode) -> Iterator[ast.Module]:
    """Syntax trees of every code cell and every solution that parses."""
    texts = [cell.source for cell in code_cells(notebook)]
    for text in [*texts, *solutions(markdown(notebook))]:
        try:
            yield parse(text)
        except SyntaxError:
            continue  # `code_parses` reports it


def assigned(tree: ast.AST) -> set[str]:
    """Names that a cell assigns."""
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@check
def is_valid(notebook: NotebookNode, path: Path) -> Iterator[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {str(error).splitlines()[0]}"


@check
def name_and_title(notebook: NotebookNode, path: Path) -> Iterator[str]:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name):
        yield f"name is {path.name}, wanted NN_short_name.ipynb"
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith(
        f"# {path.name[:2]} "
    ):
        yield f"the first cell is a header that begins with '# {path.name[:2]} '"


@check
def header_content(notebook: NotebookNode, path: Path) -> Iterator[str]:
    header = notebook.cells[0].source
    if colab_address(path.name) not in header:
        yield f"no Colab badge to {colab_address(path.name)}"
    for device in ("T4", "CPU"):
        before = rf"{MINUTES}[^.,;/\n]{{0,20}}\b{device}\b"
        after = rf"\b{device}\b[^.,;/\n]{{0,20}}{MINUTES}"
        if not re.search(f"{before}|{after}", header):
            yield f"no minutes for {device} (a number, or 'not measured')"
    if not re.search(r"Download:?\*{0,2}:?\s*(?:\d+(\.\d+)?\s*[kMG]B|nothing)", header):
        yield "no download size ('Download: 12 MB' or 'Download: nothing')"
    if not 3 <= len(re.findall(r"^[-*] ", header, re.MULTILINE)) <= 5:
        yield "three to five goals, one line each, beginning with '- '"
    images = [link for pair in LINK.findall(header) for link in pair if link]
    if not any("figures/" in link for link in images):
        yield "no figure of the result (../docs/figures/...)"


@check
def skeleton(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for tag in ("setup", "parameters", "copyme"):
        if len(tagged(notebook, tag)) != 1:
            yield f"{len(tagged(notebook, tag))} cells are tagged '{tag}', wanted one"
    if not tagged(notebook, "check"):
        yield "no cell is tagged 'check'"

    def place(test: Callable[[NotebookNode], bool]) -> int:
        return next((i for i, c in enumerate(notebook.cells) if test(c)), -1)

    def heading(word: str) -> Callable[[NotebookNode], bool]:
        found = re.compile(rf"^#+ .*{word}", re.MULTILINE | re.IGNORECASE)
        return lambda c: c.cell_type == "markdown" and bool(found.search(c.source))

    places = {
        "setup": place(lambda c: "setup" in tags(c)),
        "parameters": place(lambda c: "parameters" in tags(c)),
        "imports": place(lambda c: "import geopeft_kit as gk" in c.source.split("\n")),
        "the first check": place(lambda c: "check" in tags(c)),
        "exercises": place(heading("exercise")),
        "copyme": place(lambda c: "copyme" in tags(c)),
        "takeaways": place(heading("takeaway")),
        "sources": place(heading("source")),
    }
    yield from (f"{name} not found" for name, i in places.items() if i < 0)
    known = [(name, i) for name, i in places.items() if i >= 0]
    for (before, i), (after, j) in pairwise(known):
        if i > j:
            yield f"{before} (cell {i}) comes after {after} (cell {j})"


@check
def size(notebook: NotebookNode, path: Path) -> Iterator[str]:
    if len(notebook.cells) > MAX_CELLS:
        yield f"{len(notebook.cells)} cells, at most {MAX_CELLS}"
    written = len(nbformat.writes(notebook).encode())
    if written > MAX_BYTES:
        yield f"{written} bytes, at most {MAX_BYTES}"


@check
def cell_size(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        lines = cell.source.split("\n")
        limit = MAX_COPYME if "copyme" in tags(cell) else MAX_LINES
        if len(lines) > limit:
            yield f"cell {number} has {len(lines)} lines, at most {limit}"
        width = max(map(len, lines))
        if width > MAX_WIDTH:
            yield f"cell {number} is {width} wide, at most {MAX_WIDTH}"


@check
def stripped(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for number, cell in enumerate(notebook.cells):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            yield f"cell {number} holds outputs or an execution count"
    if "widgets" in notebook.metadata:
        yield "the metadata holds widget state: GitHub would refuse to show the page"


@check
def setup_cell(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in tagged(notebook, "setup"):
        words = set(re.findall(r"\w+", cell.source.lower()))
        for word in NOT_IN_SETUP:
            if word in words:
                yield f"the setup cell names {word}: Colab's own has to stay"
        if repository() not in cell.source:
            yield f"the setup cell does not install from {repository()}"
        code = "".join(cell.source for cell in code_cells(notebook))
        if ("geopeft-kit[maps]" in cell.source) != ("tools=True" in code):
            yield "geopeft-kit[maps], with leafmap, goes with show_map(tools=True)"
        for node in parse(cell.source).body:
            colab_only = (
                isinstance(node, ast.If)
                and "google.colab" in ast.unparse(node.test)
                and not node.orelse
            )
            if not colab_only and not isinstance(node, ast.Import | ast.ImportFrom):
                yield f"line {node.lineno} of the setup cell acts outside Colab"


@check
def parameters_cell(notebook: NotebookNode, path: Path) -> Iterator[str]:
    names: set[str] = set()
    for cell in tagged(notebook, "parameters"):
        for node in parse(cell.source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                yield f"line {node.lineno} of the parameters cell is no assignment"
            names |= assigned(node)
        if "GEOPEFT_FAST" not in cell.source or "FAST" not in names:
            yield "the parameters cell does not set FAST from GEOPEFT_FAST"
        yield from (
            f"parameter {n} is not in capitals" for n in names if n != n.upper()
        )
    others = [
        cell
        for cell in code_cells(notebook)
        if not {"parameters", "setup", "copyme"} & set(tags(cell))
    ]
    for tree in trees(nbformat.v4.new_notebook(cells=others)):
        yield from (f"{name} is set again" for name in sorted(assigned(tree) & names))


@check
def check_cells(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in tagged(notebook, "check"):
        asserts = [n for n in ast.walk(parse(cell.source)) if isinstance(n, ast.Assert)]
        if not asserts:
            yield "a check cell asserts nothing"
        if any(node.msg is None for node in asserts):
            yield "an assertion has no plain message"


@check
def code_parses(notebook: NotebookNode, path: Path) -> Iterator[str]:
    texts = [cell.source for cell in code_cells(notebook)]
    for text in [*texts, *solutions(markdown(notebook))]:
        try:
            parse(text)
        except SyntaxError as error:
            yield f"does not parse: {error.text or error}"


@check
def public_imports(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if (node.module or "").split(".")[0] == "geopeft_kit":
                    yield f"from {node.module} import ...: use import geopeft_kit as gk"
                if any(alias.name == "*" for alias in node.names):
                    yield f"star import from {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "geopeft_kit" and (
                        alias.name != "geopeft_kit" or alias.asname != "gk"
                    ):
                        yield f"import {alias.name}: use import geopeft_kit as gk"
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "gk"
                and node.attr not in [*gk.__all__, "__version__"]
            ):
                yield f"gk.{node.attr} is not a public name"


@check
def no_tricks(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            if call.startswith("sys.path."):
                yield f"{call}: no edits of the module path"
            silences = call.endswith(("filterwarnings", "simplefilter"))
            if silences and len(node.args) + len(node.keywords) == 1:
                yield "all warnings are silenced: name the message or the category"


@check
def links(notebook: NotebookNode, path: Path) -> Iterator[str]:
    found = [link for pair in LINK.findall(markdown(notebook)) for link in pair if link]
    for link in found:
        target, _, anchor = link.partition("#")
        own = f"{repository()}/blob/main/"
        if target.startswith(own):
            file = REPO / target.removeprefix(own)
        elif re.match(r"[a-z]+:", target):
            continue
        else:
            file = (path.parent / target) if target else path
        if not file.resolve().exists():
            yield f"{link} leads nowhere"
        elif (
            anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())
        ):
            yield f"{link}: {file.name} has no heading of that name"


def anchors(text: str) -> set[str]:
    """Names that a markdown page can be entered at: its headings and its <a id>."""
    slugs = set(re.findall(r"""<a (?:id|name)=["']([^"']+)["']""", text))
    for title in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", title.lower())
        slugs.add(kept.replace(" ", "-"))
    return slugs


@check
def exercises(notebook: NotebookNode, path: Path) -> Iterator[str]:
    parts = re.split(r"^#+ +Exercise \d", markdown(notebook), flags=re.MULTILINE)[1:]
    if not 2 <= len(parts) <= 4:
        yield f"{len(parts)} exercises ('### Exercise 1 ...'), wanted two to four"
    for number, part in enumerate(parts, 1):
        if len(solutions(part)) != 1:
            yield f"exercise {number} has no solution, a python fence in <details>"
        if "<details open" in part:
            yield f"the solution of exercise {number} stands open"
        if "<details" in part and "<summary>" not in part:
            yield f"the solution of exercise {number} has no <summary>"


@check
def predict_and_notice(notebook: NotebookNode, path: Path) -> Iterator[str]:
    text = markdown(notebook)
    yield from (f"no '{w}'" for w in ("Predict", "Notice") if f"**{w}" not in text)


@check
def copyme_has_licence(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in tagged(notebook, "copyme"):
        if "Apache-2.0" not in cell.source:
            yield "the copyme cell has no licence line (# Apache-2.0)"
