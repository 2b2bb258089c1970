"""The memory limit of a control group, in the files of both versions, and the refusals that follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnstore import memory_limit
from attnstore.config import ServeOptions
from attnstore.errors import InvalidArgument
from attnstore.limits import GIB, MIB, NODE_OTHER_BYTES_MIN
from attnstore.memory_limit import memory_bytes, memory_limit_bytes, require_memory, resident_bytes
from attnstore.server.node import StoreNode

V1 = "12:pids:/x\n4:memory:/pod/box\n0::/\n"
V2 = "0::/pod/box\n"


@pytest.fixture(autouse=True)
def _fake_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limit, "MEMBERSHIP", tmp_path / "membership")


def limit_of(tmp_path: Path, membership: str, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (tmp_path / "membership").write_text(membership)
    return memory_limit_bytes()


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        (V2, {"pod/box/memory.max": "1000", "pod/memory.max": "max"}, 1000),
        (V2, {"pod/box/memory.max": "max", "pod/memory.max": "2000"}, 2000),
        (V2, {"pod/box/memory.max": "3000", "pod/memory.max": "2000"}, 2000),
        (V2, {"memory.max": "1000"}, 1000),  # a container's own group, mounted as the root
        ("0::/\n", {"memory.max": "1000"}, 1000),
        ("0::/../../box\n", {"memory.max": "1000"}, 1000),
        (V1, {"memory/pod/box/memory.limit_in_bytes": "1000", "memory/memory.limit_in_bytes": "9223372036854771712"}, 1000),
        (V1, {"memory/memory.limit_in_bytes": "1000"}, 1000),
        (V1, {"memory/pod/box/memory.limit_in_bytes": "9223372036854771712"}, None),
        (V1, {"unified/memory.max": "1000"}, 1000),
        (V1, {"pids/x/memory.max": "1000"}, None),
        (V2, {"pod/box/memory.max": "max"}, None),
        (V2, {"pod/box/memory.max": "nonsense"}, None),
        (V2, {}, None),
        ("", {"memory.max": "1000"}, None),
        ("nonsense\n", {"memory.max": "1000"}, None),
    ],
)
def test_the_smallest_limit_around_the_process_counts(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    assert limit_of(tmp_path, membership, files) == limit


def test_without_control_groups_there_is_no_limit() -> None:
    assert memory_limit_bytes() is None
    assert memory_bytes() > resident_bytes(), "the machine's"


def test_what_does_not_fit_is_refused_with_both_numbers_and_what_hardly_fits_is_told() -> None:
    with pytest.raises(InvalidArgument, match=r"--capacity takes 3\.0GiB.*is 2\.0GiB.*kernel would kill"):
        require_memory("--capacity", 3 * GIB, 0, 2 * GIB)
    warning = require_memory("--capacity", 2 * GIB, MIB, 2 * GIB)
    assert warning is not None
    assert "2.0GiB" in warning
    assert require_memory("--capacity", 2 * GIB - MIB, MIB, 2 * GIB) is None


async def test_a_node_does_not_start_with_a_capacity_that_the_kernel_would_kill_it_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit_of(tmp_path, V2, {"pod/box/memory.max": str(NODE_OTHER_BYTES_MIN)})

    def node(capacity: str, **options: object) -> StoreNode:
        values = {"listen": "127.0.0.1:0", "capacity": capacity, "attend_threads": 0, **options}
        return StoreNode(ServeOptions(**values), None)  # type: ignore[arg-type]

    with pytest.raises(InvalidArgument, match=r"--capacity takes 1\.0GiB"):
        node("1GiB")
    await node("4MiB").stop(0)
    assert "may not leave enough" in caplog.text
    # Memory of a file does not count as the process' own.
    await node("1GiB", arena_path=tmp_path / "arena").stop(0)
