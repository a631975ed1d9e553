"""Importing the package is cheap, its names resolve, its imports point down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import geopeft_kit as gk

PACKAGE = Path(gk.__file__).parent
HEAVY = (
    "torch", "torchvision", "peft", "torchgeo", "timm", "transformers", "lightning",
    "leafmap", "ipyleaflet", "matplotlib", "geopandas", "pandas", "rasterio", "numpy",
)  # fmt: skip


def floors() -> dict[str, int]:
    """Room -> floor, as the picture of the house in CONTRIBUTING.md shows it."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+) \|$", page, re.MULTILINE)
    return {
        room: int(floor)
        for floor, rooms in rows
        for room in re.sub(r" \([^)]*\)", "", rooms).split(", ")
    }


# A floor may import from itself and from the floors below it.
LEVEL = floors()


def modules_after(code: str) -> set[str]:
    """Names in sys.modules of an empty process that ran `code`."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def room_of(path: Path) -> str:
    """The room that a module of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path, tree: ast.AST) -> set[str]:
    """Rooms that a module imports from, relative imports and lazy ones included."""
    package = ("geopeft_kit", *path.relative_to(PACKAGE).parts[:-1])
    dotted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            dotted |= {f"{base}.{alias.name}" for alias in node.names}
    return {d.split(".")[1] for d in dotted if d.startswith("geopeft_kit.")}


def climbs(path: Path, tree: ast.AST) -> list[str]:
    """Imports of a module that point up, in words."""
    room = room_of(path)
    return [
        f"{path.relative_to(PACKAGE)} ({room}, floor {LEVEL[room]}) imports "
        f"{other} (floor {LEVEL[other]})"
        for other in sorted(imported_rooms(path, tree))
        if other in LEVEL and LEVEL[other] > LEVEL[room]
    ]


def sources() -> list[Path]:
    """Modules of the package, without the front door, which knows every room."""
    return [
        p
        for p in sorted(PACKAGE.rglob("*.py"))
        if p.parent != PACKAGE or p.stem[0] != "_"
    ]


def test_import_loads_nothing_heavy():
    loaded = modules_after("import geopeft_kit; dir(geopeft_kit)")
    assert "geopeft_kit" in loaded
    assert sorted(loaded & set(HEAVY)) == []


def test_the_probe_for_heavy_imports_can_fail():
    assert "numpy" in modules_after("import numpy")


@pytest.mark.slow
def test_model_code_needs_no_map_library():
    loaded = modules_after("import geopeft_kit as gk; gk.build_model; gk.fit")
    assert sorted(loaded & {"leafmap", "ipyleaflet", "peft", "torchgeo"}) == []


@pytest.mark.parametrize("name", gk.__all__)
def test_public_name_resolves(name: str):
    value = getattr(gk, name)
    assert value is not None
    assert name in dir(gk)
    assert getattr(gk, name) is value


def test_unknown_name_suggests_close_ones():
    with pytest.raises(AttributeError, match="load_backbone"):
        gk.load_backbones_  # noqa: B018
    with pytest.raises(AttributeError, match="It has"):
        gk.qqqq  # noqa: B018
    assert not hasattr(gk, "__wrapped__")


def test_names_for_type_checkers_match_the_lazy_table():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    typed = {
        alias.name: (node.module or "").removeprefix("geopeft_kit").lstrip(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == gk._HOME | dict.fromkeys(gk._MODULES, "")
    assert sorted(typed) == sorted(gk.__all__)


def test_every_room_has_a_floor():
    assert sorted({room_of(p) for p in sources()} - set(LEVEL) - {"weights"}) == []


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    assert climbs(path, ast.parse(path.read_text())) == []


def test_nobody_but_simulated_data_imports_the_simulated_land():
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in sources()
        if room_of(path) != "world"
        and "world" in imported_rooms(path, ast.parse(path.read_text()))
    }
    assert importers == {"data/sample.py", "data/simulated.py"}


@pytest.mark.parametrize(
    "line",
    [
        "from geopeft_kit.maps import show_map",
        "from ..maps import show_map",
        "from .. import maps",
        "import geopeft_kit.maps",
        "def f():\n    from geopeft_kit import maps",
    ],
)
def test_a_climbing_import_is_found(line: str):
    assert climbs(PACKAGE / "data" / "folder.py", ast.parse(line))


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Calls that would run code which a file brings along."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if re.search(r"pickle\.(loads?|Unpickler)$|^pd\.read_pickle$", name):
            found.append(f"line {call.lineno}: {name}")
        if name in ("np.load", "numpy.load") and options.get("allow_pickle") == "True":
            found.append(f"line {call.lineno}: {name} with allow_pickle")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path: Path):
    assert unsafe_loads(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "pickle.Unpickler(file)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_an_unsafe_load_is_found(line: str):
    assert unsafe_loads(ast.parse(line))
