"""Files and folders: written whole or not at all; keys change with their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from geopeft_kit import files
from geopeft_kit.files import content_key, whole_folder


def write(target: Path, text: str, **options: bool) -> None:
    with whole_folder(target, **options) as part:
        assert part.parent == target.parent and part != target
        (part / "sub").mkdir()
        (part / "sub" / "a.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_a_folder_takes_its_place_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "data"
    write(target, "one")
    (target / "old.txt").write_text("only the first has this")
    write(target, "two")
    assert names(target) == ["sub", "sub/a.txt"]
    assert (target / "sub/a.txt").read_text() == "two"
    assert names(target.parent) == ["data", "data/sub", "data/sub/a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "data", "one")
    for target in (tmp_path / "data", tmp_path / "new" / "data"):
        with pytest.raises(type(error)), whole_folder(target) as part:
            (part / "half.txt").write_text("ha")
            raise error
    assert names(tmp_path) == ["data", "data/sub", "data/sub/a.txt"]


def test_the_old_folder_comes_back_where_the_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", "one")
    move = files.os.replace

    def fails_once(source: Path, target: Path) -> None:
        if (Path(source) / "sub/a.txt").read_text() == "two":
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(files.os, "replace", fails_once)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "data", "two")
    assert names(tmp_path) == ["data", "data/sub", "data/sub/a.txt"]
    assert (tmp_path / "data/sub/a.txt").read_text() == "one"


def test_a_folder_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "one", replace=False)  # an empty one goes
    with pytest.raises(FileExistsError, match="there already"):
        write(tmp_path / "data", "two", replace=False)
    assert (tmp_path / "data/sub/a.txt").read_text() == "one"
    assert names(tmp_path) == ["data", "data/sub", "data/sub/a.txt"]


def test_a_key_changes_with_facts_and_with_content(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    first = content_key({"x": 1, "y": [2, 3]}, [file])
    assert first == content_key({"y": [2, 3], "x": 1}, [file])
    assert len(first) == 64 and set(first) <= set("0123456789abcdef")
    others = {content_key({"x": 1, "y": [3, 2]}, [file]), content_key({"x": 1})}
    file.write_text("two")
    others.add(content_key({"x": 1, "y": [2, 3]}, [file]))
    assert len(others | {first}) == 4
