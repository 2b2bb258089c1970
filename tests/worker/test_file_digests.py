"""Digests of files that are computed once."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attnstore_worker import file_digests
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.file_digests import cache_dir, files_digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1" * 100)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as unchanged for long; no call sets the time of a file's last change."""
    monkeypatch.setattr(file_digests, "_AT_REST_S", -3_600.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    read: list[Path] = []
    real = file_digests._read

    def counted(path: Path) -> tuple[bytes, list[int]]:
        read.append(path)
        return real(path)

    monkeypatch.setattr(file_digests, "_read", counted)
    return read


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_dir({"ATTNSTORE_CACHE_DIR": "/a"}) == Path("/a")
    assert cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/attnstore")
    assert cache_dir({}) == Path.home() / ".cache" / "attnstore"


def test_a_digest_is_that_of_the_names_and_bytes(file: Path, cache: Path) -> None:
    expected = hashlib.blake2b(b"model.safetensors\0" + b"100\0" + b"1" * 100, digest_size=32, person=b"attnstore-model").digest()
    assert files_digest([file], cache) == expected
    other = file.with_name("other.safetensors")
    other.write_bytes(b"2")
    assert len({files_digest(files, cache) for files in ([file], [other], [file, other], [other, file])}) == 4


@pytest.mark.usefixtures("at_rest")
def test_a_file_is_read_once(file: Path, cache: Path, reads: list[Path]) -> None:
    digests = {files_digest([file], cache) for _ in range(3)}
    assert (len(digests), reads) == (1, [file])


@pytest.mark.usefixtures("at_rest")
def test_a_file_that_changed_is_read_again_although_size_and_time_are_as_before(file: Path, cache: Path) -> None:
    before, times = files_digest([file], cache), file.stat()
    file.write_bytes(b"1" * 50 + b"2" + b"1" * 49)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files_digest([file], cache) != before


@pytest.mark.usefixtures("at_rest")
def test_a_file_in_the_place_of_another_is_read(file: Path, cache: Path) -> None:
    before, times = files_digest([file], cache), file.stat()
    new = file.with_name("new")
    new.write_bytes(b"2" * 100)
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.rename(file)
    assert files_digest([file], cache) != before


def test_the_digest_of_a_file_that_has_just_changed_is_not_kept(file: Path, cache: Path, reads: list[Path]) -> None:
    files_digest([file], cache)
    files_digest([file], cache)
    assert reads == [file, file]
    assert list((cache / "digests").iterdir()) == []


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("content", ["", '{"state": [', "[]", '{"state": null, "digest": 1}'])
def test_a_damaged_entry_is_replaced(content: str, file: Path, cache: Path, reads: list[Path]) -> None:
    digest = files_digest([file], cache)
    [entry] = (cache / "digests").iterdir()
    entry.write_text(content)
    assert [files_digest([file], cache) for _ in range(2)] == [digest] * 2
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(file: Path, cache: Path) -> None:
    digest = files_digest([file], cache)
    cache.with_name("no folder").write_text("")
    assert files_digest([file], cache.with_name("no folder")) == digest


@pytest.mark.usefixtures("at_rest")
def test_of_two_who_ask_at_once_one_reads(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opens the entry for itself, as processes do."""
    reads, both = [], threading.Event()
    real = file_digests._read

    def slow(path: Path) -> tuple[bytes, list[int]]:
        reads.append(path)
        if len(reads) == 2:
            both.set()
        both.wait(0.2)
        return real(path)

    monkeypatch.setattr(file_digests, "_read", slow)
    with ThreadPoolExecutor(2) as threads:
        digests = set(threads.map(lambda _: files_digest([file], cache), range(2)))
    assert (len(digests), reads) == (1, [file])


def test_a_file_that_changes_while_it_is_read_has_no_digest(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Appending:
        """A digest in whose first update the file grows."""

        def __init__(self, *_: object, **__: object) -> None:
            self._left = 1

        def update(self, _: bytes) -> None:
            for _ in range(self._left):
                with file.open("ab") as content:
                    content.write(b"more")
            self._left = 0

    blake2b = hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda *data, **options: (blake2b if data else Appending)(*data, **options))
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors changed while it was read"):
        files_digest([file], cache)


def test_a_file_that_is_not_there_is_named(file: Path, cache: Path) -> None:
    file.unlink()
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors cannot be read"):
        files_digest([file], cache)
