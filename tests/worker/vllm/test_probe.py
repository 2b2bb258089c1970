"""The first measurement of the link to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.testing import ManualClock, StoreProcess
from attnstore.types import ReadResult
from attnstore_worker.testing import MemoryStore
from attnstore_worker.vllm.identity import vllm_namespace
from attnstore_worker.vllm.probe import probe_link
from tests.worker.vllm.answers import LAYOUT, ROOT


def test_the_link_is_measured_before_the_first_request() -> None:
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url) as client:
        transfers = probe_link(client, ROOT, LAYOUT, MonotonicClock(), deadline_ms=5_000)
    assert [transfer.bytes for transfer in transfers] == [LAYOUT.page_bytes] * 3


@pytest.mark.parametrize(("read_ms", "reads"), [(290.0, 4), (310.0, 2)])
def test_a_slow_link_is_measured_by_one_read(read_ms: float, reads: int) -> None:
    clock = ManualClock()

    class Slow(MemoryStore):
        asked = 0

        def read(self, *arguments: Any, **options: Any) -> ReadResult:
            self.asked += 1
            clock.advance_ms(read_ms)
            return super().read(*arguments, **options)

    store = Slow()
    assert len(probe_link(store, ROOT, LAYOUT, clock, deadline_ms=5_000)) == reads - 1
    assert store.asked == reads


@pytest.mark.parametrize("told_apart_by", ["token", "salt"])
def test_each_of_two_tenants_of_a_layout_measures_its_link(tmp_path: Path, told_apart_by: str) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('ada = "adas"\nbob = "bobs"\n')
    with StoreProcess("--capacity", "64MiB", "--tokens-file", str(tokens)) as node:
        for tenant in ("adas", "bobs"):
            token, salt = (tenant, "") if told_apart_by == "token" else ("adas", tenant)
            space = vllm_namespace(LAYOUT, {"model": "m"}, tenant_salt=salt)
            with attnstore.connect(node.url, token=token) as client:
                sealed = client.stats().pages_sealed
                for _ in range(2):
                    assert len(probe_link(client, space, LAYOUT, MonotonicClock(), deadline_ms=5_000)) == 3
                assert client.stats().pages_sealed == sealed + 1, "of a page of its own"
