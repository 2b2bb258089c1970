"""A node whose arena is a file that clients on its host map: which clients may map it, and which use another transport."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnstore
from attnstore import PageLayout, PageStatus
from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument
from attnstore.testing import StoreProcess
from tests.samples import Batch, make_batch

PAGE = PageLayout(layers=4, kv_heads=1, head_dim=1024, block_tokens=16, dtype=DType.OPAQUE)


@pytest.fixture
def path() -> Iterator[Path]:
    """A path of mapped memory, like a device of CXL memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "arena"


def stored(client: attnstore.Client, pages: int, model: str) -> Batch:
    batch = make_batch(pages, model=model, layout=PAGE)
    client.register_layout(batch.namespace, PAGE)
    assert all(verdict.is_kept for verdict in client.write(batch.namespace, batch.hashes, batch.pages).verdicts)
    return batch


def test_a_client_that_names_the_file_maps_it_and_another_one_reads_over_tcp(path: Path) -> None:
    with StoreProcess("--capacity", "16MiB", "--arena-path", str(path)) as node:
        with attnstore.connect(node.url, shared_path=path) as client:
            batch = stored(client, 40, "named")
            buffers = batch.buffers()
            answer = client.read(batch.namespace, batch.hashes, buffers)
            assert (answer.leading_hits, answer.transport) == (40, "shm")
            assert buffers == batch.pages
            lease = client.lease(batch.namespace, batch.hashes, 10_000)[1]
            assert lease is not None
            with client.view(batch.namespace, batch.hashes, lease=lease) as views:
                assert [bytes(view) for view in views.pages if view is not None] == batch.pages
                assert views.verify() == (PageStatus.OK,) * 40
        with attnstore.connect(node.url) as client:
            client.register_layout(batch.namespace, PAGE)
            buffers = batch.buffers()
            assert client.read(batch.namespace, batch.hashes, buffers).transport == "tcp"
            assert buffers == batch.pages


def test_a_client_that_names_another_file_maps_nothing(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(1 << 20))
    with (
        StoreProcess("--capacity", "4MiB", "--arena-path", str(path)) as node,
        attnstore.connect(node.url) as writer,
        attnstore.connect(node.url, transport="shm", shared_path=other) as client,
    ):
        batch = stored(writer, 1, "another")
        client.register_layout(batch.namespace, PAGE)
        with pytest.raises(attnstore.AttnStoreError, match="neither sealed nor the one named"):
            client.read(batch.namespace, batch.hashes, batch.buffers())


def test_a_node_of_several_tenants_does_not_hand_its_file_out(path: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('a = "token-a"\nb = "token-b"\n')
    with StoreProcess("--capacity", "4MiB", "--arena-path", str(path), "--tokens-file", str(tokens)) as node:
        with attnstore.connect(node.url, token="token-a", shared_path=path) as client:
            assert "shm-file" not in client.describe().transports
            batch = stored(client, 3, "tenants")
            buffers = batch.buffers()
            assert client.read(batch.namespace, batch.hashes, buffers).transport == "tcp"
            assert buffers == batch.pages
        with attnstore.connect(node.url, token="token-a", transport="shm", shared_path=path) as client:
            client.register_layout(batch.namespace, PAGE)
            with pytest.raises(InvalidArgument, match="does not offer"):
                client.read(batch.namespace, batch.hashes, batch.buffers())


def test_a_restarted_node_on_the_same_file_shows_readers_of_the_old_one_that_their_pages_are_gone(path: Path) -> None:
    with StoreProcess("--capacity", "4MiB", "--arena-path", str(path)) as node:
        client = attnstore.connect(node.url, shared_path=path)
        batch = stored(client, 5, "restarted")
        lease = client.lease(batch.namespace, batch.hashes, 600_000)[1]
        assert lease is not None
        views = client.view(batch.namespace, batch.hashes, lease=lease)
        node.kill()
        assert views.verify() == (PageStatus.OK,) * 5
        with StoreProcess("--capacity", "4MiB", "--arena-path", str(path)) as again, attnstore.connect(again.url) as other:
            stored(other, 5, "something else")
            assert views.verify() == (PageStatus.MISSING,) * 5
        client.close()


@pytest.mark.parametrize(("before", "after"), [("24MiB", "4MiB"), ("4MiB", "24MiB"), ("24MiB", "40MiB"), ("40MiB", "24MiB")])
def test_a_node_restarted_with_another_capacity_shows_readers_of_the_old_one_nothing_else(
    path: Path, before: str, after: str
) -> None:
    with StoreProcess("--capacity", before, "--arena-path", str(path)) as node:
        client = attnstore.connect(node.url, shared_path=path)
        batch = stored(client, 28, "before")
        lease = client.lease(batch.namespace, batch.hashes, 600_000)[1]
        assert lease is not None
        views = client.view(batch.namespace, batch.hashes, lease=lease)
        node.kill()
        assert views.verify() == (PageStatus.OK,) * 28
        with StoreProcess("--capacity", after, "--arena-path", str(path)) as again, attnstore.connect(again.url) as other:
            assert views.verify() == (PageStatus.MISSING,) * 28
            for life in range(4):
                stored(other, 28, f"after {life}")
            assert views.verify() == (PageStatus.MISSING,) * 28
        client.close()


def test_a_node_does_not_start_on_a_file_that_is_no_arena(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not to be lost\n")
    with pytest.raises(RuntimeError, match=r"--arena-path .*notes\.txt is no arena.*delete it or name another"):
        StoreProcess("--capacity", "4MiB", "--arena-path", str(path))
    assert path.read_text() == "not to be lost\n"
