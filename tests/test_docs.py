"""The pages say what is true of the repository: commands, versions, errors, links."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from notebook_form import LINK, anchors, repository
from notebook_tools import NOTEBOOKS, REPO
from packaging.requirements import Requirement

import geopeft_kit as gk

PAGES = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").glob("*.md"))]
README = (REPO / "README.md").read_text()
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Errors that other programs write: the text, and who writes it. Compiled code
# holds most of them, so that they cannot be looked up here.
FOREIGN = {
    "operator torchvision::nms does not exist": "torch",
    "numpy.dtype size changed, may indicate binary incompatibility": "numpy",
    "Python 3.11 or newer is needed": "Makefile",
    "No module named 'geopeft_kit'": "Python",
    "Error displaying widget": "ipywidgets",
    "Loading widget...": "ipywidgets",
    "the 'state' key is missing from 'metadata.widgets'": "GitHub",
    "CUDA out of memory": "torch",
    "Expected all tensors to be on the same device": "torch",
    "can't convert cuda:0 device type tensor to numpy": "torch",
    "DefaultCPUAllocator: can't allocate memory": "torch",
    "Target modules … not found in the base model": "peft",
}


def fences(text: str, language: str) -> list[str]:
    """Code of a page's fences in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def make_targets() -> set[str]:
    """Targets that the Makefile offers."""
    text = (REPO / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):.*##", text, re.MULTILINE))


@lru_cache
def messages() -> list[str]:
    """Texts in the package's code; a place that is filled in becomes a NUL."""
    found = []
    for path in Path(gk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    v.value if isinstance(v, ast.Constant) else "\0"
                    for v in node.values
                ]
                found.append("".join(parts))
    return found


def test_commands_of_the_pages_exist():
    for page in PAGES:
        text = page.read_text()
        code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *fences(text, "bash")])
        asked = set(re.findall(r"\bmake +(?:[A-Z]+=\S* +)*([a-z]+)", code))
        assert asked <= make_targets(), page.name
    assert {"tour", "test", "lab"} <= set(re.findall(r"make ([a-z]+)", README))


def make(*arguments: str) -> subprocess.CompletedProcess:
    """Run make in the repository, also where the tests themselves run under make."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(
        ["make", *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_every_target_is_phony_and_told_by_help():
    text = (REPO / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    assert phony == make_targets()
    run = make("help")
    assert {line.split()[0] for line in run.stdout.splitlines()} == phony


@pytest.mark.parametrize("uv", ["", "uv"])
def test_both_install_routes_use_pyproject(uv: str, tmp_path: Path):
    run = make("-n", f"UV={uv}", "PYTHON=python3", f"VENV={tmp_path / 'v'}", "test")
    assert run.returncode == 0, run.stderr
    assert '-e ".[dev]"' in run.stdout
    assert ("uv pip install" in run.stdout) == bool(uv)
    assert ("-m pip install" in run.stdout) != bool(uv)
    assert "-m pytest -n auto --dist loadgroup" in run.stdout.splitlines()[-1]


def test_an_old_interpreter_is_refused(tmp_path: Path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 'Python 3.11 or newer is needed' >&2; exit 1\n")
    old.chmod(0o755)
    for python in ("", str(old)):
        run = make(f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "test")
        assert run.returncode != 0
        assert "3.11 or newer is needed" in run.stdout + run.stderr
    assert not (tmp_path / "venv").exists()


def test_environment_file_is_in_step_with_pyproject():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    python, pip, from_pip = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert from_pip == {"pip": ["-e .[dev]"]}
    assert "dev" in PROJECT["optional-dependencies"]


def test_versions_are_lower_bounds_only():
    extras = PROJECT["optional-dependencies"]
    lists = [PROJECT["dependencies"], *extras.values()]
    for requirement in [entry for entries in lists for entry in entries]:
        if not requirement.startswith("geopeft-kit["):
            # a tool of the developers may have an upper bound, what users get may not
            above = r"(,<[0-9.]+)?" if requirement in extras["dev"] else ""
            pattern = r"[a-z0-9-]+(\[[a-z]+\])?>=[0-9.]+" + above
            assert re.fullmatch(pattern, requirement)
    names = [re.split(r"[\[>]", entry)[0] for entry in PROJECT["dependencies"]]
    assert names.index("torchvision") == names.index("torch") + 1


def test_lower_bounds_admit_what_colab_ships():
    lines = (REPO / "tests" / "colab.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and line[0] != "#")
    extras = PROJECT["optional-dependencies"]
    entries = [*PROJECT["dependencies"], *extras["maps"], *extras["notebooks"]]
    compared = [one for one in map(Requirement, entries) if one.name in pins]
    assert {"ipywidgets", "ipykernel", "ipyleaflet", "timm"} <= {
        one.name for one in compared
    }
    for one in compared:
        assert one.specifier.contains(pins[one.name]), one


def test_what_tests_and_energy_look_for_comes_with_an_extra():
    """A test that skips without a package is skipped for good if nothing brings it."""
    extras = PROJECT["optional-dependencies"]
    found = {re.split(r"[\[>]", e)[0] for name in extras for e in extras[name]}
    texts = [path.read_text() for path in (REPO / "tests").glob("test_*.py")]
    asked = {
        name
        for text in texts
        for name in re.findall(r'reason="pip install ([\w-]+)"', text)
    }
    assert asked - {"transformers"} <= found  # peft brings that one
    assert {"mambapy", "nvidia-ml-py"} <= asked
    assert any(e.startswith("geopeft-kit[") and "energy" in e for e in extras["dev"])


def test_version_and_address_are_the_same_everywhere():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == gk.__version__
    assert citation["repository-code"] == repository()


@pytest.mark.parametrize("code", fences(README, "python"))
def test_readme_code_uses_public_names(code: str):
    used = set(re.findall(r"\bgk\.(\w+)", code))
    assert used
    assert used <= set(gk.__all__)


@pytest.mark.slow
def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEOPEFT_FAST", "1")
    for code in fences(README, "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_readme_lists_every_notebook():
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in README


def test_readme_names_every_method():
    table = README[README.index("| group | methods |") :].split("\n\n", 1)[0]
    methods = [line.split("|")[2] for line in table.splitlines()]
    named = re.findall(r"`(\w+)`", " ".join(methods))
    assert sorted(named) == sorted({card.name for card in gk.list_methods()})


def test_readme_begins_with_a_picture_of_a_real_run():
    after_title = README.split("\n", 1)[1].strip()
    picture = re.match(
        r"""(?:!\[[^]]+\]\(|<img[^>]*src=["'])(docs/figures/[^"')]+)""", after_title
    )
    assert picture, "the first thing after the title is a picture from docs/figures/"
    assert (REPO / picture.group(1)).stat().st_size > 10_000


def test_readme_is_short():
    assert len(README.splitlines()) < 180


@EACH_PAGE
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in [link for pair in LINK.findall(text) for link in pair if link]:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), link


def test_glossary_goes_both_ways():
    text = (REPO / "docs" / "glossary.md").read_text()
    halves = text.split("\n## ")[1:]
    assert len(halves) == 2
    for half in halves:
        terms = re.findall(r"^### (.+)$", half, re.MULTILINE)
        assert len(terms) >= 25
        assert terms == sorted(terms, key=str.lower)
        for entry in half.split("\n### ")[1:]:
            assert len(entry.split()) > 8, entry
    every = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(set(every)) == len(every)


def error_headings() -> list[str]:
    """Literal error texts that head the entries of the troubleshooting page."""
    text = (REPO / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^### `(.+)`$", text, re.MULTILINE)


@pytest.mark.parametrize("heading", error_headings())
def test_troubleshooting_is_headed_by_real_errors(heading: str):
    if heading in FOREIGN:
        return
    pieces = [piece.strip() for piece in heading.split("…")]
    whole = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    assert any(whole.search(message) for message in messages()), (
        f"no message of the package reads {heading!r}"
    )


def test_foreign_errors_are_all_used_and_the_search_can_fail():
    assert set(FOREIGN) <= set(error_headings())
    assert not any("no such message anywhere".upper() in m for m in messages())
    makefile = (REPO / "Makefile").read_text()
    assert all(text in makefile for text, who in FOREIGN.items() if who == "Makefile")


def test_every_entry_has_cause_and_fix():
    text = (REPO / "docs" / "troubleshooting.md").read_text()
    for entry in text.split("\n### ")[1:]:
        assert "**Cause.**" in entry and "**Fix.**" in entry, entry.splitlines()[0]


def test_no_machine_path_in_a_tracked_text():
    """A path of the machine it was written on helps nobody who reads it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = re.compile(rf"{re.escape(str(REPO.parent))}/|{re.escape(str(Path.home()))}/")
    for name in listed.stdout.splitlines():
        path = REPO / name
        if path.suffix in {".py", ".md", ".ipynb", ".toml", ".yml", ".cff", ""}:
            assert not home.search(path.read_text(errors="ignore")), name
