"""Hand-over between nodes: on every transport handed-over pages take free memory only, and deleted pages stay deleted."""

from __future__ import annotations

import pytest

from attnstore import PageStatus, aio
from attnstore.core.hashing import page_checksum
from attnstore.testing import StoreProcess
from tests.samples import make_batch

PAGES = 8
OLD_MS = 3_600_000


@pytest.mark.parametrize("transport", ["grpc", "tcp", "auto"])
async def test_a_page_that_is_handed_over_is_stored_unless_it_was_deleted_or_the_node_is_full(transport: str) -> None:
    batch = make_batch(PAGES, model=transport)
    capacity = str(PAGES * batch.layout.page_bytes)
    with StoreProcess("--capacity", capacity) as node:
        async with aio.connect(node.url, transport=transport) as client:
            assert isinstance(client, aio.AsyncClient)
            await client.register_layout(batch.namespace, batch.layout)

            async def hand_over(begin: int, end: int) -> set[PageStatus]:
                pages = batch.pages[begin:end]
                written = await client.hand_over(
                    batch.namespace,
                    batch.hashes[begin:end],
                    pages,
                    sealed=[page_checksum(page) for page in pages],
                    ages_ms=[OLD_MS] * (end - begin),
                )
                return set(written.verdicts)

            await client.delete(batch.namespace, batch.hashes[:4])
            assert await hand_over(0, 4) == {PageStatus.DELETED}
            assert await hand_over(4, 8) == {PageStatus.STORED}
            assert await hand_over(4, 8) == {PageStatus.ALREADY_PRESENT}
            written = await client.write(batch.namespace, batch.hashes[:4], batch.pages[:4])
            assert set(written.verdicts) == {PageStatus.STORED}
            buffers = batch.buffers()
            assert (await client.read(batch.namespace, batch.hashes, buffers)).leading_hits == PAGES
            assert buffers == batch.pages
            more = make_batch(PAGES + 1, model=transport)
            full = await client.hand_over(
                batch.namespace,
                more.hashes[PAGES:],
                more.pages[PAGES:],
                sealed=[page_checksum(more.pages[PAGES])],
                ages_ms=[OLD_MS],
            )
            assert full.verdicts == (PageStatus.NO_SPACE,)
            assert (await client.match(batch.namespace, [batch.hashes])).hits == (PAGES,)
