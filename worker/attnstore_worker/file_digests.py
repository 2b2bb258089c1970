"""Digests of large files, computed once.

Owns: the cache folder `ATTNSTORE_CACHE_DIR` (default `~/.cache/attnstore`) and the digests kept in it. Invariant: a kept digest is
used only for the bytes that it was computed from: file system, inode, size and times of modification and change are those of then,
and the file had been at rest when it was read. Processes that ask for one file at once read it once: the others wait for the first.
Standard library only, because vLLM's processes import it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Final

from attnstore.environment import variable
from attnstore_worker.errors import ModelUnavailable

_PERSON: Final = b"attnstore-model"
_READ_BYTES: Final = 1 << 22
_THREADS_MAX: Final = 8
_AT_REST_S: Final = 2.0
"""A file that changed more recently may change again without a change of its times, whose resolution is limited."""

_State = list[int]


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder of converted models and kept digests."""
    configured = variable("cache_dir", environment)
    if configured is not None:
        return Path(configured)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnstore"


def files_digest(files: Sequence[Path], cache: Path) -> bytes:
    """Returns 32 bytes that identify the names and bytes of `files`, at least one, in order. The folders make no difference.

    BLAKE2b-256, personalised `attnstore-model`, of each file's `name NUL size NUL bytes`; of more than one file that of their
    digests. Files that are not known to `cache` are read at about 1 GB/s for each of up to eight files at once. Raises
    `ModelUnavailable` for a file that cannot be read, or that changes meanwhile.
    """
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, _THREADS_MAX), "digest") as threads:
        digests = list(threads.map(partial(_file_digest, cache=cache), files))
    return digests[0] if len(digests) == 1 else hashlib.blake2b(b"".join(digests), digest_size=32, person=_PERSON).digest()


def _file_digest(path: Path, cache: Path) -> bytes:
    place = cache / "digests" / hashlib.blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
    try:
        entry = _locked(place)
    except OSError:  # a cache that cannot be written costs time, nothing else
        return _read(path)[0]
    with entry:  # closing it releases the lock
        kept = _kept(entry)
        with suppress(OSError):  # `_read` tells which
            if kept is not None and kept[0] == _state(path.stat()):
                return kept[1]
        digest, state = _read(path)
        with suppress(OSError):
            if _is_at_rest(state):
                entry.seek(0)
                entry.truncate()
                json.dump({"state": state, "digest": digest.hex()}, entry)
            else:
                place.unlink()  # who waits for its lock reads the file too
        return digest


def _locked(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(entry, fcntl.LOCK_EX)
    except OSError:
        entry.close()
        raise
    return entry


def _kept(entry: IO[str]) -> tuple[_State, bytes] | None:
    entry.seek(0)
    try:
        told = json.load(entry)
        return told["state"], bytes.fromhex(told["digest"])
    except (OSError, ValueError, LookupError, TypeError):  # new, or cut off by the end of a process
        return None


def _read(path: Path) -> tuple[bytes, _State]:
    digest = hashlib.blake2b(digest_size=32, person=_PERSON)
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            before = _state(os.fstat(file.fileno()))
            digest.update(f"{path.name}\0{before[2]}\0".encode())
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
            if _state(os.fstat(file.fileno())) != before:
                raise ModelUnavailable(f"{path} changed while it was read")
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
    return digest.digest(), before


def _state(status: os.stat_result) -> _State:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_at_rest(state: _State) -> bool:
    return time.time() - max(state[-2:]) / 1e9 > _AT_REST_S
