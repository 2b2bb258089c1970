"""The size of a pool as a share of free memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnstore.core.layout import DType, PageLayout
from attnstore.memory_limit import memory_bytes, resident_bytes
from attnstore.sizes import Share, parse_share
from attnstore_worker.actions import pool_bytes_of
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.device.sizing import pool_blocks
from attnstore_worker.engine import EngineOptions
from attnstore_worker.errors import PoolTooSmall
from attnstore_worker.model import LoadedModel

LAYOUT = PageLayout(layers=1, kv_heads=1, head_dim=32, block_tokens=16, dtype=DType.FP32)
PAGE_BYTES = 2 * 16 * 32 * 4


class Bounded(SimulatedDevice):
    """A device with this much free memory."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__()
        self._free_bytes = free_bytes

    def free_bytes(self) -> int:
        return self._free_bytes


@pytest.mark.parametrize(
    ("share", "reserve_bytes", "blocks"),
    [(1.0, 0, 100), (0.9, 0, 90), (0.5, 40 * PAGE_BYTES, 30), (0.015, 0, 1), (1.0, 99 * PAGE_BYTES, 1)],
)
def test_a_share_is_of_what_is_free_beside_the_reserve(share: float, reserve_bytes: int, blocks: int) -> None:
    device = Bounded(100 * PAGE_BYTES + 7)
    assert pool_blocks(device, LAYOUT, Share(share), reserve_bytes=reserve_bytes) == blocks


@pytest.mark.parametrize(("share", "reserve_bytes"), [(0.005, 0), (1.0, 100 * PAGE_BYTES), (1.0, 1000 * PAGE_BYTES)])
def test_a_share_that_holds_no_page_is_refused_with_the_figures(share: float, reserve_bytes: int) -> None:
    told = rf"a pool of \S+% of the 400.0KiB that simulated has free.* one page of {PAGE_BYTES} bytes"
    with pytest.raises(PoolTooSmall, match=told):
        pool_blocks(Bounded(100 * PAGE_BYTES), LAYOUT, Share(share), reserve_bytes=reserve_bytes)


def test_the_share_is_measured_after_a_step_of_as_many_tokens_as_there_can_be(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    logits = type(tiny.decoder).logits

    def counted(decoder: Any, token_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        steps.append(len(token_ids))
        return logits(decoder, token_ids, *others)

    class Measured(Bounded):
        def free_bytes(self) -> int:
            steps.append(-1)
            return super().free_bytes()

    monkeypatch.setattr(type(tiny.decoder), "logits", counted)
    options = EngineOptions(chunk_tokens=32, sequences_max=5)
    page_bytes = tiny.layout(16).page_bytes
    assert pool_bytes_of(Share(0.5), tiny, options, Measured(41 * page_bytes)) == 20 * page_bytes
    step_tokens = options.scheduler_limits().step_tokens
    assert step_tokens == 69
    assert steps[-1] == -1
    assert max(steps) >= step_tokens


def test_the_cpu_has_what_the_process_may_still_use() -> None:
    blocks = pool_blocks(HostDevice(), LAYOUT, Share(0.5))
    assert 0 < blocks * PAGE_BYTES <= (memory_bytes() - resident_bytes() // 2) // 2


@pytest.mark.parametrize(("text", "share", "told"), [("90%", 0.9, "90%"), ("100 %", 1.0, "100%"), ("12.5%", 0.125, "12.5%")])
def test_a_share_is_read_and_shown_as_it_is_written(text: str, share: float, told: str) -> None:
    assert parse_share(text) == pytest.approx(share)
    assert str(parse_share(text)) == told


@pytest.mark.parametrize("text", ["0%", "0.000%", "100.5%", "-5%", "%", "5", "1e1%", "\u0665%", "5%%", " 5%"])
def test_any_other_text_is_no_share(text: str) -> None:
    assert parse_share(text) is None
