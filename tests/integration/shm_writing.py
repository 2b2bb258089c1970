"""Helpers of the tests of writes through lent memory: pages to write, and checks of what the node stores."""

from __future__ import annotations

import attnstore
from attnstore import PageLayout
from attnstore.testing import StoreProcess
from tests.samples import SMALL, Batch, make_batch


def registered(client: attnstore.Client, pages: int, model: str, layout: PageLayout = SMALL) -> Batch:
    batch = make_batch(pages, model=model, layout=layout)
    client.register_layout(batch.namespace, layout)
    return batch


def assert_holds(node: StoreProcess, batch: Batch) -> None:
    """Reads as another client, over another transport."""
    with attnstore.connect(node.url, transport="tcp") as client:
        client.register_layout(batch.namespace, batch.layout)
        buffers = batch.buffers()
        assert client.read(batch.namespace, batch.hashes, buffers).leading_hits == len(batch.hashes)
    assert buffers == batch.pages


def used_bytes(node: StoreProcess) -> int:
    with attnstore.connect(node.url, transport="grpc") as client:
        return client.stats().used_bytes
