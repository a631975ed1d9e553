"""Every data script, whole, against a server with a miniature of its upstream."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import upstreams
from hub_server import serve
from upstreams import UPSTREAMS, Mirror, Upstream, mirror

from geopeft_kit import download
from geopeft_kit.data import ChipData, read_chip_folder

if TYPE_CHECKING:
    from archives import File

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"
COMMANDS = sorted(
    p.stem for p in SCRIPTS.glob("*.py") if "main(SOURCE" in p.read_text("utf-8")
)
EVERYDAY = ("sen1floods11", "hls_burn_scars", "whu_building")


def rows(choose: Callable[[Upstream], bool]) -> pytest.MarkDecorator:
    """A test for each data set; all but a few are slow."""
    chosen = [
        pytest.param(
            row, id=row.id, marks=[] if row.script in EVERYDAY else pytest.mark.slow
        )
        for row in UPSTREAMS
        if choose(row)
    ]
    return pytest.mark.parametrize("row", chosen)


every = rows(lambda row: True)
fetched = rows(lambda row: not row.by_hand)
packed = rows(lambda row: bool(row.archives))


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(autouse=True)
def _much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts ask for the room that the real data sets take."""
    large = shutil.disk_usage(".")._replace(free=10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: large)


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


@pytest.mark.parametrize(
    "row", [r for r in UPSTREAMS if r.script in EVERYDAY], ids=lambda row: row.id
)
def test_downloads_converts_and_then_does_nothing(
    row: Upstream, module: ModuleType, served: Mirror, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = module.convert(None, tmp_path, **row.options)
    check(row, folder)
    does_nothing(row, module, served, folder, capsys)
    served.files.clear()  # what was fetched is kept: made again without the server
    module.convert(None, tmp_path, overwrite=True, **row.options)
    check(row, folder)


def does_nothing(
    row: Upstream, module: ModuleType, served: Mirror, folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A second run changes no file, asks no server, and says so."""
    before, asked = listing(folder), len(served.ranges)
    capsys.readouterr()
    assert module.convert(None, folder.parent, **row.options) == folder
    assert "nothing to do" in capsys.readouterr().out
    assert listing(folder) == before
    assert len(served.ranges) == asked


@every
def test_converts_what_is_on_the_disk_and_only_reads_it(
    row: Upstream, module: ModuleType, home: Path, tmp_path: Path
) -> None:
    before = listing(home)
    with read_only(home):
        folder = module.convert(home, tmp_path, **row.options)
        check(row, folder)
        small = module.convert(home, tmp_path, subset="small", **row.options)
    assert listing(home) == before
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, small.name}
    full, part = (read_chip_folder(f)[1] for f in (folder, small))
    assert set(part["chip"]) <= set(full["chip"])
    assert len(part) == row.small
    assert part["split"].nunique() == full["split"].nunique()
    assert module.SOURCE.small, "what it takes is stated"


@packed
@pytest.mark.slow
def test_converts_archives_that_are_on_the_disk(
    row: Upstream, module: ModuleType, served: Mirror, home: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    work = tmp_path / "data/downloads" / module.SOURCE.name
    for file in module.files(work, "full", **row.options):
        content = upstreams.pack(row, home, file.name)
        assert content is not None
        (mine / file.name).write_bytes(content)
    before = listing(mine)
    with read_only(mine):
        check(row, module.convert(mine, tmp_path / "data", **row.options))
    assert listing(mine) == before
    assert served.ranges == [], "something was fetched"
    victim = max(mine.iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises((ValueError, RuntimeError), match=victim.name):
        module.convert(mine, tmp_path / "again", **row.options)
    assert not (tmp_path / "again" / module.SOURCE.name).exists()


@fetched
@pytest.mark.slow
def test_every_fault_is_said_and_leaves_nothing(
    row: Upstream, module: ModuleType, served: Mirror, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(error: type[BaseException], match: str) -> None:
        with pytest.raises(error, match=match):
            module.convert(None, tmp_path, **row.options)
        assert {p.name for p in tmp_path.iterdir()} <= {"downloads"}

    served.content_type = "text/html"
    fails(RuntimeError, "gave a web page instead of a file")
    served.content_type = "application/octet-stream"
    served.gone = True
    fails(FileNotFoundError, r"does not exist .* 404")
    served.gone = False
    with monkeypatch.context() as patch:
        patch.setattr(module, "files", with_wrong_checksums(module.files))
        name = next(iter(module.files(tmp_path, "full", **row.options)))
        if name.md5 or name.sha256:
            fails(RuntimeError, r"(MD5|SHA-256) is .*, expected 0{32}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_chips", interrupted(module.read_chips))
        served.cut_after = [10]
        fails(KeyboardInterrupt, "in the middle")
    assert "bytes=10-" in served.ranges, "a cut download started again"
    folder = module.convert(None, tmp_path, **row.options)
    check(row, folder)
    does_nothing(row, module, served, folder, capsys)


def with_wrong_checksums(files: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any, **options: Any) -> Iterator[File]:
        for file in files(*arguments, **options):
            md5, sha256 = file.md5 and "0" * 32, file.sha256 and "0" * 64
            yield replace(file, md5=md5, sha256=sha256)

    return wrong


def interrupted(read_chips: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(iter(read_chips(*arguments, **options)))
        raise KeyboardInterrupt("in the middle")

    return stop


def test_a_killed_conversion_is_begun_again(tmp_path: Path) -> None:
    import whu_building

    home = tmp_path / "home"
    upstreams.whu_building(home)
    read = whu_building.read_chips

    def killed(*arguments: Any) -> Iterator[Any]:
        for number, chip in enumerate(read(*arguments)):
            if number == 2:
                os._exit(9)
            yield chip

    child = os.fork()
    if child == 0:
        whu_building.read_chips = killed
        whu_building.convert(home, tmp_path / "data")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    begun = (tmp_path / "data").glob(".whu_building.*/images/*.tif")
    assert list(begun), "it was killed too early to test anything"
    assert not (tmp_path / "data/whu_building").exists()
    folder = whu_building.convert(home, tmp_path / "data")
    assert len(read_chip_folder(folder)[1]) == 6


def test_a_broken_upstream_image_is_named(tmp_path: Path) -> None:
    import whu_building

    upstreams.whu_building(tmp_path)
    image = tmp_path / whu_building.FOLDER / "train/image/1.tif"
    for content in (image.read_bytes()[:100], b"<html>", b""):
        image.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"train/image/1\.tif cannot be read"):
            whu_building.convert(tmp_path, tmp_path / "data")
        assert not (tmp_path / "data").exists()
    mask = tmp_path / whu_building.FOLDER / "val/label/0.tif"
    upstreams.picture(image)
    upstreams.picture(mask, values=np.full((16, 16), 7))
    with pytest.raises(ValueError, match=r"label/0\.tif holds 7; expected 0, 1, 255"):
        whu_building.convert(tmp_path, tmp_path / "data")
    mask.unlink()
    with pytest.raises(FileNotFoundError, match="label holds no pictures"):
        whu_building.convert(tmp_path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_dry_run_say_what_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(option: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", option])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("source", "paper", "licence", "download", "small", "layout"):
        assert f"  {word}" in text
    for option in ("--root", "--from DIR", "--subset", "--dry-run", "--overwrite"):
        assert option in text
    assert "licence" in run("--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_scripts_is_complete() -> None:
    text = (SCRIPTS / "README.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"`{name}.py`" not in text] == []


def test_what_has_to_be_got_by_hand_says_how(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for row in (row for row in UPSTREAMS if row.by_hand):
        module = importlib.import_module(row.script)
        message = "cannot be fetched by a script"
        with pytest.raises(FileNotFoundError, match=message) as caught:
            module.convert(None, tmp_path / "data", **row.options)
        assert module.SOURCE.steps in str(caught.value)
        with pytest.raises(FileNotFoundError, match="empty holds no"):
            module.convert(tmp_path / "empty", tmp_path / "data", **row.options)
        assert not (tmp_path / "data").exists()


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
