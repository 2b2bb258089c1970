"""Sample pages: small, all different, and the same in every run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnstore import BlockHash, Client, DType, Namespace, PageLayout, PageStatus, ReadResult, block_hashes, namespace
from attnstore.types import Space

SMALL = PageLayout(layers=2, kv_heads=2, head_dim=8, dtype=DType.FP32)
"""4 KiB per page: one chunk."""

LARGE = PageLayout(layers=5, kv_heads=8, head_dim=128, block_tokens=128, dtype=DType.BF16)
"""2.5 MiB per page: several chunks, the last one shorter."""


@dataclass(frozen=True)
class Batch:
    """Consecutive pages of one sequence."""

    layout: PageLayout
    namespace: Namespace
    hashes: list[BlockHash]
    pages: list[bytes]

    @property
    def space(self) -> Space:
        """The batch's namespace of the tenant `default`."""
        return Space("default", self.namespace)

    def buffers(self) -> list[bytearray]:
        """One zeroed buffer for each page."""
        return [bytearray(self.layout.page_bytes) for _ in self.pages]


def make_batch(pages: int, *, model: str, layout: PageLayout = SMALL) -> Batch:
    """Returns `pages` pages of random bytes, in a namespace of their own for each `model`."""
    digits = random.Random(model)
    space = namespace(layout, model=model.encode())
    tokens = range(pages * layout.block_tokens)
    return Batch(
        layout,
        space,
        block_hashes(space, tokens, layout.block_tokens),
        [digits.randbytes(layout.page_bytes) for _ in range(pages)],
    )


def eventually(claim: Callable[[], bool], within_s: float = 10.0, every_s: float = 0.01) -> bool:
    """Polls until the claim is true. Returns False if it does not become true in time."""
    end_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > end_s:
            return False
        time.sleep(every_s)
    return True


def deleted_after_reading(client: Client, namespace: bytes, hashes: Sequence[bytes]) -> tuple[PageStatus, ...]:
    """Deletes pages that a reader may have whole before the node unpins them. Returns the first answer of each but PINNED."""
    statuses = list(client.delete(namespace, hashes))

    def none_is_pinned() -> bool:
        if PageStatus.PINNED in statuses:
            for index, status in enumerate(client.delete(namespace, hashes)):
                if statuses[index] is PageStatus.PINNED:
                    statuses[index] = status
        return PageStatus.PINNED not in statuses

    eventually(none_is_pinned)
    return tuple(statuses)


def stored(client: Client, pages: int, model: str, layout: PageLayout = SMALL) -> Batch:
    """A batch that the client has stored, all pages for the first time."""
    batch = make_batch(pages, model=model, layout=layout)
    client.register_layout(batch.namespace, layout)
    assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {PageStatus.STORED}
    return batch


def read_back(client: Client, batch: Batch) -> ReadResult:
    """Reads a batch and checks that the bytes of every hit are those written."""
    buffers = batch.buffers()
    result = client.read(batch.namespace, batch.hashes, buffers)
    hits = [status is PageStatus.OK for status in result.statuses]
    assert all(buffer == page for buffer, page, hit in zip(buffers, batch.pages, hits, strict=True) if hit)
    return result
