"""Real nodes in processes of their own, and clients of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import attnstore
from attnstore.testing import StoreProcess
from tests.samples import SMALL, Batch, make_batch


@pytest.fixture(scope="module")
def shared_node() -> Iterator[StoreProcess]:
    """One node for the tests of a module that use only their own namespace."""
    with StoreProcess("--capacity", "64MiB") as node:
        yield node


@pytest.fixture
def node() -> Iterator[StoreProcess]:
    """A node for one test, to count on, stop or kill."""
    with StoreProcess("--capacity", "64MiB") as node:
        yield node


@pytest.fixture(params=["grpc", "tcp", "shm"])
def client(shared_node: StoreProcess, request: pytest.FixtureRequest) -> Iterator[attnstore.Client]:
    """A client of the shared node, once for each transport of pages."""
    with attnstore.connect(shared_node.url, transport=request.param) as client:
        yield client


@pytest.fixture
def batch_of(request: pytest.FixtureRequest) -> Callable[..., Batch]:
    """`batch_of(pages, layout)` returns pages that no other test uses, not registered yet."""

    def make(pages: int, layout: attnstore.PageLayout = SMALL, suffix: str = "") -> Batch:
        return make_batch(pages, model=request.node.nodeid + suffix, layout=layout)

    return make
