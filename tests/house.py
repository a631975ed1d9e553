"""Measure the package: its size, its import graph, how objects travel through a fit.

`python tests/house.py` prints the table; `test_house.py` keeps the numbers where they
are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "geopeft_kit"


def sources(folder: Path = PACKAGE) -> list[Path]:
    """The Python files of a folder, sorted."""
    return sorted(folder.rglob("*.py"))


def count_lines(path: Path) -> int:
    """Lines of a file, blank ones included."""
    return len(path.read_text().splitlines())


def count_docstring_lines(path: Path) -> int:
    """Lines of a file that belong to docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    total = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            text = node.body[0]
            total += text.end_lineno - text.lineno + 1
    return total


def module_name(path: Path) -> str:
    """The dotted name of a file of the package; a package is named without __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Module -> modules of the kit that it imports, anywhere in its text.

    Imports inside functions and under TYPE_CHECKING count. The front door is left out:
    it knows every room.
    """
    known = {module_name(p): p for p in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        if name != "geopeft_kit":
            found = _imported(path, known)
            graph[name] = found - {name, "geopeft_kit"}
    return graph


def _imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the kit that a file imports; of a name, the module that holds it."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {name for name in found if name in known}


def circles(graph: dict[str, set[str]] | None = None) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    graph = imports() if graph is None else graph
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({name} | {o for o in reach[name] if name in reach.get(o, ())}))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph.get(name, ())
    return seen


def journey(call: Callable[[], object], held: object) -> tuple[int, set[str]]:
    """How an object travels through the kit's modules during a call.

    Args:
        call: What is run.
        held: The object to follow, found among the local variables of a frame.

    Returns:
        How often the kit's running frame that holds it is of another module than
        before, calls and returns counted, and the modules.
    """
    stays: list[str] = []

    def profile(frame: Any, event: str, _: object) -> None:
        if event not in ("call", "return"):
            return
        inside = frame if event == "call" else frame.f_back
        module = inside.f_globals.get("__name__", "") if inside else ""
        if not module.startswith("geopeft_kit") or stays[-1:] == [module]:
            return
        if any(value is held for value in inside.f_locals.values()):
            stays.append(module)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(stays), set(stays)


def journeys_of_a_fit() -> Iterator[tuple[str, int, set[str]]]:
    """(name, changes of module, modules) of a fit's `model` and `data`, two chips.

    Without a head start, which repeats the same step until it has converged.
    """
    import torch

    import geopeft_kit as gk

    for name in ("model", "data"):
        torch.manual_seed(0)
        data = gk.simulated_data(
            train_regions=["delta"],
            chips_per_region=2,
            size=32,
            batch_size=2,
            val_fraction=0,
        )
        backbone = gk.load_backbone("geopeft_tiny", bands=data.bands, weights=None)
        gk.attach(backbone, "lora")
        model = gk.build_model(backbone, "linear", num_classes=data.num_classes)
        held = {"model": model, "data": data}[name]
        changes, rooms = journey(
            lambda m=model, d=data: gk.fit(
                m, d, epochs=1, head_start="none", progress=False
            ),
            held,
        )
        yield name, changes, rooms


def table() -> dict[str, int]:
    """The size of the house in numbers."""
    files = sources()
    return {
        "lines of the package": sum(map(count_lines, files)),
        "of them docstring": sum(map(count_docstring_lines, files)),
        "modules": len(files),
        "lines of the longest module": max(map(count_lines, files)),
        "lines of the tests": sum(map(count_lines, sources(PACKAGE.parent / "tests"))),
        "import circles": len(circles()),
    }


if __name__ == "__main__":
    for what, number in table().items():
        print(f"{what:30}{number:8,}")
    for group in circles():
        print("circle:", ", ".join(group))
    for what, changes, rooms in journeys_of_a_fit():
        print(f"{what}: {changes} changes of module, in {len(rooms)} modules")
        print("   ", ", ".join(sorted(rooms)))
