"""Archives from the internet: unpacked whole, or refused and nothing kept."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


def zipped(path: Path, name: str, kind: str = "file") -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("fine.txt", "fine")
        member = zipfile.ZipInfo(name)
        if kind == "link":
            member.external_attr = 0o120777 << 16
        file.writestr(member, "evil")


def tarred(path: Path, name: str, kind: str = "file") -> None:
    types = {
        "file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
    }  # fmt: skip
    with tarfile.open(path, "w:gz") as file:
        for title, sort in (("fine.txt", tarfile.REGTYPE), (name, types[kind])):
            member = tarfile.TarInfo(title)
            member.type, member.linkname = sort, "../../etc/hosts"
            member.size = 4 if sort == tarfile.REGTYPE else 0
            file.addfile(member, io.BytesIO(b"evil"))


REFUSED = [
    ("../evil.txt", "file"), ("a/../../evil.txt", "file"), ("/tmp/evil.txt", "file"),
    ("C:\\evil.txt", "file"), ("..\\evil.txt", "file"), ("link", "link"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [
        *((zipped, *row) for row in REFUSED),
        *((tarred, *row) for row in REFUSED),
        (tarred, "hard", "hard"),
        (tarred, "device", "device"),
    ],
)
def test_archives_that_point_out_are_refused(
    tmp_path: Path, write: Callable[..., None], name: str, kind: str
) -> None:
    from archives import unpack

    archive, out = tmp_path / "a.bin", tmp_path / "deep/out"
    write(archive, name, kind)
    with pytest.raises(ValueError, match="points out of the folder"):
        unpack([archive], out)
    assert list(out.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "deep"]


@pytest.mark.parametrize("write", [zipped, tarred])
def test_broken_archives_are_refused_and_whole_ones_unpack_once(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    from archives import unpack

    archive, out = tmp_path / "a.bin", tmp_path / "out"
    write(archive, "deep/b.txt")
    whole = archive.read_bytes()
    for broken in (b"<html>busy</html>", b"", whole[: len(whole) // 2], whole[:20]):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match="no readable archive"):
            unpack([archive], out)
        assert list(out.iterdir()) == []
    archive.write_bytes(whole)
    (out / ".a.bin.part/deep").mkdir(parents=True)
    (out / ".a.bin.part/deep/old.txt").write_text("half")
    unpack([archive], out)
    assert not (out / "deep/old.txt").exists()
    assert (out / "deep/b.txt").read_text() == "evil"
    (out / "fine.txt").unlink()
    assert not (out / ".a.bin.part").exists(), "left by a run that was killed"
    archive.unlink()
    unpack([archive], out)  # done: nothing is read again
    assert not (out / "fine.txt").exists()


def test_a_split_archive_is_read_as_one(tmp_path: Path) -> None:
    from archives import unpack

    archive = tmp_path / "whole"
    tarred(archive, "b.txt")
    content, parts = archive.read_bytes(), []
    for number, end in enumerate((40, 80, None)):
        parts.append(tmp_path / f"part{number}")
        parts[-1].write_bytes(content[40 * number : end])
    unpack(parts, tmp_path / "out")
    assert (tmp_path / "out/b.txt").read_bytes() == b"evil"


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    import whu_building
    from archives import unpack

    archive, out = tmp_path / "a.zip", tmp_path / "out"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("small.txt", "fine")
        file.writestr("large.bin", bytes(100_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.zip is left half-unpacked"):
            unpack([archive], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(out.iterdir()) == []
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"unpacks to 0 MB.*0 MB free"):
        unpack([archive], out)
    with pytest.raises(OSError, match="8600 MB are needed"):
        whu_building.convert(None, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_pickled_label_is_read_but_never_run(tmp_path: Path) -> None:
    import os
    import pickle

    from hdf5 import pickled_label

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    for protocol in range(6):
        for label in (0, 1, 255, 256, 70_000):
            facts = {"bands_order": ["a"], "label": label, "evil": Evil()}
            text = str(pickle.dumps(facts, protocol))
            assert pickled_label(text, tmp_path) == label
    assert not (tmp_path / "evil").exists()
    for text in ("", "b'", "12", str(b"abc"), str(pickle.dumps({"label": "x"}))):
        with pytest.raises(ValueError, match="label"):
            pickled_label(text, tmp_path)


def test_a_chain_of_links_is_refused(tmp_path: Path) -> None:
    """Links inside the folder, so deep that no system call can resolve them."""
    import archives

    path = "/".join(["d" * 200] * 20)
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        for name, kind, target in (
            (f"{path}/long", tarfile.SYMTYPE, "../" * 20),
            ("escape", tarfile.SYMTYPE, f"{path}/long/../.."),
            ("escape/new.txt", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member, io.BytesIO(b""))
    with pytest.raises(ValueError, match="points out of the folder"):
        archives.unpack([tmp_path / "evil.tar"], tmp_path / "root" / "folder")
    assert not list(tmp_path.rglob("new.txt"))
