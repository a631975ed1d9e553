"""Every data script, whole, against a server with a miniature of its upstream."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hub_server import serve
from upstreams import UPSTREAMS, Mirror, Upstream, mirror

from geopeft_kit import download
from geopeft_kit.data import ChipData, read_chip_folder

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"
DOWNLOADS = [row for row in UPSTREAMS if not row.by_hand]
every = pytest.mark.parametrize("row", UPSTREAMS, ids=lambda row: row.id)
fetched = pytest.mark.parametrize("row", DOWNLOADS, ids=lambda row: row.id)


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Miniatures by the builder that made them; tests leave them as they are."""
    return {}


@pytest.fixture
def home(
    row: Upstream, homes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    key = row.build.__qualname__
    if key not in homes:
        homes[key] = tmp_path_factory.mktemp(key)
        row.build(homes[key])
    return homes[key]


@pytest.fixture
def module(row: Upstream) -> ModuleType:
    return importlib.import_module(row.script)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    with serve(Mirror()) as site:
        yield site


@pytest.fixture
def served(
    row: Upstream, module: ModuleType, home: Path, site: Mirror,
    monkeypatch: pytest.MonkeyPatch,
) -> Mirror:  # fmt: skip
    mirror(site, row, module, home, monkeypatch)
    return site


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a folder, with its size and time."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(row: Upstream, folder: Path) -> ChipData:
    """The chip folder holds the splits it should, and every chip can be read."""
    data = ChipData(folder, split="index", batch_size=2)
    assert data.index["split"].value_counts().to_dict() == dict(row.counts)
    assert data.info.licence and data.info.citation and data.info.source
    for split in data.splits:
        for batch in data.dataloader(split):
            assert batch["image"].shape[1:] == row.batch
            assert ("mask" in batch) or ("label" in batch) or split == "unlabelled"
    return data


@fetched
def test_downloads_converts_and_then_does_nothing(
    row: Upstream, module: ModuleType, served: Mirror, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = module.convert(None, tmp_path, **row.options)
    check(row, folder)
    before, asked = listing(folder), len(served.ranges)
    capsys.readouterr()
    assert module.convert(None, tmp_path, **row.options) == folder
    assert "nothing to do" in capsys.readouterr().out
    assert listing(folder) == before
    assert len(served.ranges) == asked
    served.files.clear()  # what was fetched is kept: made again without the server
    module.convert(None, tmp_path, overwrite=True, **row.options)
    assert len(served.ranges) == asked
    check(row, folder)


@every
def test_converts_what_is_on_the_disk_and_only_reads_it(
    row: Upstream, module: ModuleType, home: Path, tmp_path: Path
) -> None:
    before = listing(home)
    with read_only(home):
        folder = module.convert(home, tmp_path, **row.options)
        check(row, folder)
    assert listing(home) == before
    assert {p.name for p in tmp_path.iterdir()} == {folder.name}


@every
@pytest.mark.slow
def test_small_is_stated_and_lies_in_full(
    row: Upstream, module: ModuleType, home: Path, tmp_path: Path
) -> None:
    full = read_chip_folder(module.convert(home, tmp_path, **row.options))[1]
    small = module.convert(home, tmp_path, subset="small", **row.options)
    index = read_chip_folder(small)[1]
    assert set(index["chip"]) <= set(full["chip"])
    assert len(index) == row.small
    assert index["split"].nunique() == full["split"].nunique()
    assert module.SOURCE.small


class read_only:
    """Take the right to write away from a folder, where that stops this user."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]

    def __enter__(self) -> None:
        for folder in self.folders:
            folder.chmod(0o555)

    def __exit__(self, *_: object) -> None:
        for folder in self.folders:
            folder.chmod(0o755)
