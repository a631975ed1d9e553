"""What all tests share: one thread, no pollution of the user's cache, real data."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported anywhere: one thread is the fastest setting for tiny
# models on a shared machine, and it makes repeated runs equal bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from browser import chromium, visit  # noqa: F401  (fixtures: a browser)
from colab import colab  # noqa: F401  (fixture: an environment like Colab's)

if TYPE_CHECKING:
    import torch

    import geopeft_kit as gk

REPO = Path(__file__).resolve().parent.parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Group a test for pytest-xdist, which reads the groups before the hook below."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes minutes first, and skip `gpu` tests without a CUDA device.

    What starts last, alone on its core, keeps the others waiting: first notebooks and
    browsers, then files with a slow test, and the quick ones fill up the end.
    """
    slow = {_named(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda i: (not _takes_minutes(i), _named(i) not in slow))
    _skip_gpu(items)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the process: modules, tests.

    Every `fit` collects before it measures, and would look at a million objects.
    """
    gc.collect()
    gc.freeze()


def _group(item: pytest.Item) -> str:
    """Tests of one group share a process: those of a notebook, or of a file.

    Whatever looks at a notebook's one run must be where that run is.
    """
    chosen = getattr(item, "callspec", None)
    path = chosen.params.get("path") if chosen else None
    if isinstance(path, Path) and path.suffix == ".ipynb":
        return path.stem
    return item.path.stem


def _named(item: pytest.Item) -> str:
    """The group of an item, once it has one."""
    return item.get_closest_marker("xdist_group").args[0]


def _takes_minutes(item: pytest.Item) -> bool:
    return _named(item)[:2].isdigit() or "browser" in _named(item)


def _skip_gpu(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> gk.ChipData:
    """Chips of two classes that a few steps learn."""
    from toy import toy_data

    return toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep downloads and simulated scenes of a test run out of the user's cache.

    Every process has its own; simulated scenes, which are written whole or not at all,
    are made once for all of them.
    """
    base = tmp_path_factory.getbasetemp()
    scenes = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "scenes"
    scenes.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        (cache / "geopeft_kit").mkdir()
        (cache / "geopeft_kit" / "simulated").symlink_to(scenes)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("GEOPEFT_CACHE", str(cache / "geopeft_kit"))
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data, from GEOPEFT_REAL_DATA; skips where it is absent."""
    default = REPO.parent / "shared" / "data"
    folder = Path(os.environ.get("GEOPEFT_REAL_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GEOPEFT_REAL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory):
    """Function: notebook path -> the one folder in which this session runs it."""
    folders: dict[Path, Path] = {}

    def folder(path: Path) -> Path:
        if path not in folders:
            folders[path] = tmp_path_factory.mktemp(path.stem)
        return folders[path]

    return folder


@pytest.fixture(scope="session")
def browser_path() -> str:
    """Path of a Chromium. Absent: a skip, or a failure with REQUIRE_BROWSER=1."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    message = "no Chromium on PATH; on Debian: apt-get install chromium"
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection but those to this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(f"network is off in this test; refused {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def hls_image() -> torch.Tensor:
    """Two images with the six HLS bands, (2, 6, 32, 32), reflectance 0-1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 6, 32, 32, generator=generator) * 0.4
