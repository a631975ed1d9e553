"""Downloads against a real server on this machine: cuts, checksums, retries, locks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import CONTENT, Site, serve

from geopeft_kit import download
from geopeft_kit.backbones.card import WeightFile
from geopeft_kit.backbones.weights import weight_url
from geopeft_kit.download import fetch, hub_url

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    with serve(Site()) as site:
        yield site


def left_over(folder: Path) -> set[str]:
    """Files in a folder that users can see."""
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


def test_first_download_is_recorded_and_later_ones_compare(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "weights.bin"
    assert fetch(site.url, path) == path
    assert path.read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "1.0 MB" in said and SHA256 in said
    assert left_over(path.parent) == {"weights.bin", "weights.bin.sha256"}

    fetch(site.url, path)
    assert len(site.ranges) == 1, "the second call asked the server again"

    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(RuntimeError, match=SHA256):
        fetch(site.url, path)
    assert not path.exists()


def test_resumes_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, 200_000]
    path = fetch(site.url, tmp_path / "weights.bin", sha256=SHA256, progress=False)
    assert path.read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert site.sent == len(CONTENT), "bytes were sent twice"
    assert left_over(tmp_path) == {"weights.bin"}


def test_resumes_in_a_later_call(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    site.cut_after = [400_000]
    with pytest.raises(RuntimeError, match=r"400,000 bytes are kept"):
        fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert not (tmp_path / "weights.bin").exists()
    fetch(site.url, tmp_path / "weights.bin", sha256=SHA256, progress=False)
    assert site.ranges == [None, "bytes=400000-"]


@pytest.mark.parametrize("etag", ['"two"', 'W/"weak"', ""])
def test_starts_again_when_the_file_changed_or_may_have(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    site.cut_after = [400_000]
    site.etag = '"one"' if etag == '"two"' else etag
    with pytest.raises(RuntimeError):
        fetch(site.url, tmp_path / "weights.bin", progress=False)
    site.etag, site.content = etag, CONTENT[::-1]
    path = fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert path.read_bytes() == CONTENT[::-1], "two versions were glued together"


def test_checksum_mismatch_names_both_and_leaves_nothing(
    site: Site, tmp_path: Path
) -> None:
    wrong = "0" * 64
    with pytest.raises(RuntimeError) as caught:
        fetch(site.url, tmp_path / "weights.bin", sha256=wrong, progress=False)
    assert wrong in str(caught.value) and SHA256 in str(caught.value)
    assert left_over(tmp_path) == set()


@pytest.mark.parametrize("status", [429, 503])
def test_waits_for_a_busy_server(site: Site, tmp_path: Path, status: int) -> None:
    site.statuses = [status, status]
    path = fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert path.read_bytes() == CONTENT
    assert len(site.ranges) == 3


def test_gives_up_on_a_server_that_stays_busy(site: Site, tmp_path: Path) -> None:
    site.statuses = [503] * 99
    with pytest.raises(RuntimeError, match=r"in 5 tries \(the server answered 503\)"):
        fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert len(site.ranges) == 5


def test_missing_file_is_said_at_once(site: Site, tmp_path: Path) -> None:
    url = site.url.replace("weights.bin", "gone.bin")
    with pytest.raises(FileNotFoundError, match=r"does not exist .* 404"):
        fetch(url, tmp_path / "gone.bin", progress=False)
    assert len(site.ranges) == 1


def test_forbidden_says_what_to_do(site: Site, tmp_path: Path) -> None:
    site.statuses = [401]
    with pytest.raises(RuntimeError, match=r"401.*weights=<local path>"):
        fetch(site.url, tmp_path / "weights.bin", progress=False)


def test_a_web_page_is_not_a_file(site: Site, tmp_path: Path) -> None:
    site.content_type = "text/html; charset=utf-8"
    with pytest.raises(RuntimeError, match="web page"):
        fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert "weights.bin" not in left_over(tmp_path)


def test_no_network_is_one_sentence(site: Site, tmp_path: Path) -> None:
    parts = urllib.parse.urlsplit(site.url)
    url = f"http://127.0.0.1:9{parts.path}"  # the discard port: nobody listens
    with pytest.raises(RuntimeError) as caught:
        fetch(url, tmp_path / "weights.bin", progress=False)
    text = str(caught.value)
    assert url in text and "weights=<local path>" in text and text.count(". ") == 0
    assert caught.value.__suppress_context__, "the user sees a chain of errors"
    assert left_over(tmp_path) == set()


def test_other_kinds_of_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file:///etc/hostname"):
        fetch("file:///etc/hostname", tmp_path / "x")


def _fetch_in_process(url: str, path: str, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    fetch(url, path, sha256=SHA256, progress=False)


def test_two_processes_fetch_once(site: Site, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    path = tmp_path / "weights.bin"
    jobs = [
        context.Process(target=_fetch_in_process, args=(site.url, str(path), gate))
        for _ in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(20)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert site.sent == len(CONTENT), "the file was sent twice"


def test_read_only_cache(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "weights.bin"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(RuntimeError, match=r"Read-only.*GEOPEFT_CACHE"):
            fetch(site.url, path, progress=False)

    path.parent.mkdir()
    path.write_bytes(CONTENT)
    with monkeypatch.context() as patch:  # what is there already is still served
        patch.setattr(Path, "mkdir", refuse)
        patch.setattr(download, "_write_text", refuse)
        patch.setattr(download.os, "access", lambda *_: False)
        assert fetch(site.url, path, progress=False) == path
    assert not site.ranges


def test_full_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        usage = download.shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(download.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(RuntimeError, match=r"needs 1,048,576 bytes.*1,000 free"):
            fetch(site.url, tmp_path / "weights.bin", progress=False)

    def fill(_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_read", fill)
    with pytest.raises(RuntimeError, match="disk is full"):
        fetch(site.url, tmp_path / "weights.bin", progress=False)
    assert left_over(tmp_path) == set()


def test_hub_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    expected = "https://huggingface.co/owner/model/resolve/v1/w.pt"
    assert hub_url("owner/model", "w.pt", "v1") == expected
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1234/")
    file = WeightFile("w.pt", repo="owner/model")
    expected = "http://127.0.0.1:1234/owner/model/resolve/main/w.pt"
    assert weight_url(file) == expected
