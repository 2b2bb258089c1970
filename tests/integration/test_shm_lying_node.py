"""Nodes that send false data to readers and writers over shared memory: none of it crashes a client or passes as a page."""

from __future__ import annotations

import os
import socket
import time

import pytest

from attnstore import PageStatus
from attnstore.client.base import ReadPlan, WritePlan
from attnstore.client.landing import Landing
from attnstore.client.transports.shm import ShmTransport
from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import NamespaceUnknown, ProtocolError
from attnstore.streams.shm import ShmStream
from attnstore.wire import shm
from attnstore.wire.shm import Kind, Place
from tests.integration.shm_peer import LyingNode
from tests.memory_files import sealed_file
from tests.samples import SMALL, make_batch

MISSING, STORED = PageStatus.MISSING, PageStatus.STORED
A_PLACE = Place(extent=0, tenancy=1, offset_bytes=0, size_bytes=SMALL.page_bytes, stamp=1, checksum=1)


def read_from(lying: LyingNode) -> PageStatus:
    transport = ShmTransport(lambda _name, _deadline: (lying.address, b"t" * 32), channels=1)
    landing = Landing(1, [bytearray(SMALL.page_bytes)], SMALL.page_bytes)
    plan = ReadPlan(b"n" * 32, [b"h" * 32], 0, 2, SMALL.layer_bytes, True, None, landing, Deadline(MonotonicClock(), 10_000))
    try:
        transport.read(plan).wait()
    finally:
        transport.close()
    return landing.result().statuses[0]


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ([A_PLACE, A_PLACE], "placed 2 pages of 1"),
        ([], "placed 0 pages of 1"),
        ([A_PLACE._replace(offset_bytes=(1 << 20) - 1)], "outside its extent"),
        ([A_PLACE._replace(size_bytes=SMALL.page_bytes - 1)], f"of a page of which {SMALL.page_bytes} were asked for"),
    ],
    ids=["too many", "too few", "beyond the extent", "too short"],
)
def test_places_that_no_honest_node_gives_are_a_broken_protocol(places: list[Place | PageStatus], complaint: str) -> None:
    def lie(stream: ShmStream, kind: Kind) -> None:
        assert kind is Kind.LOCATE
        stream.send(shm.encode_located(places))

    with LyingNode(lie) as node, pytest.raises(ProtocolError, match=complaint):
        read_from(node)


@pytest.mark.parametrize("what", ["no descriptor", "two", "not a file", "unsealed", "too short", "shorter than the extent"])
def test_a_descriptor_that_could_kill_its_reader_is_not_mapped(what: str) -> None:
    file_bytes = shm.ExtentLayout(1 << 20).file_bytes

    def lie(stream: ShmStream, kind: Kind) -> None:
        if kind is Kind.LOCATE:
            stream.send(shm.encode_located([A_PLACE]))
        elif what == "no descriptor":
            stream.send(shm.encode_mapped(0, file_bytes))
        elif what == "two":
            file = sealed_file(file_bytes)
            socket.send_fds(stream._socket, [shm.encode_mapped(0, file_bytes)], [file, file])
            os.close(file)
        else:
            descriptor = {
                "not a file": lambda: os.open("/dev/null", os.O_RDONLY),
                "unsealed": lambda: os.memfd_create("lie"),
                "too short": lambda: sealed_file(4096),
                "shorter than the extent": lambda: sealed_file(file_bytes - 1),
            }[what]()
            stream.send_with_descriptor(shm.encode_mapped(0, file_bytes), descriptor)
            os.close(descriptor)

    open_before = len(os.listdir("/proc/self/fd"))
    with LyingNode(lie) as node, pytest.raises(ProtocolError):
        read_from(node)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_page_whose_extent_went_to_another_tenant_meanwhile_is_a_miss() -> None:
    def answer(stream: ShmStream, kind: Kind) -> None:
        stream.send(shm.encode_located([A_PLACE]) if kind is Kind.LOCATE else shm.encode_gone())

    with LyingNode(answer) as node:
        assert read_from(node) is MISSING


def test_zeros_of_an_extent_that_was_given_up_are_a_miss() -> None:
    """A reader that maps too late finds the old file, emptied."""

    def answer(stream: ShmStream, kind: Kind) -> None:
        if kind is Kind.LOCATE:
            stream.send(shm.encode_located([A_PLACE]))
        else:
            file_bytes = shm.ExtentLayout(1 << 20).file_bytes
            descriptor = sealed_file(file_bytes)
            stream.send_with_descriptor(shm.encode_mapped(0, file_bytes), descriptor)
            os.close(descriptor)

    with LyingNode(answer) as node:
        assert read_from(node) is MISSING


def write_to(lying: LyingNode, pages: int = 1) -> tuple[PageStatus, ...]:
    batch = make_batch(pages, model="to a liar")
    transport = ShmTransport(lambda _name, _deadline: (lying.address, b"t" * 32), channels=1)
    plan = WritePlan(batch.namespace, batch.hashes, list(map(memoryview, batch.pages)), Deadline(MonotonicClock(), 10_000))
    try:
        return transport.write(plan).wait().verdicts
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (shm.encode_taken([STORED, STORED]), "2 verdicts on 1"),
        (shm.encode_taken([]), "0 verdicts on 1"),
        (shm.encode_taken([STORED])[:-1] + b"\xfa", "250"),
        (shm.encode_lent(), "TAKEN was due"),
    ],
    ids=["too many", "too few", "no verdict", "another message"],
)
def test_answers_that_no_honest_node_gives_are_a_broken_protocol(answer: bytes, complaint: str) -> None:
    def lie(stream: shm.ShmStream, kind: Kind) -> None:
        stream.send(shm.encode_lent() if kind is Kind.LEND else answer)

    with LyingNode(lie) as node, pytest.raises(ProtocolError, match=complaint):
        write_to(node)


def test_a_call_that_was_refused_ends_with_the_nodes_last_answer() -> None:
    """Its later pages are in flight: a slow node would store them after the caller has registered the namespace again."""
    answered: list[Kind] = []

    def refuse(stream: shm.ShmStream, kind: Kind) -> None:
        if kind is Kind.LEND:
            stream.send(shm.encode_lent())
            return
        if answered:
            time.sleep(0.1)
        answered.append(kind)
        stream.send(shm.encode_refusal(NamespaceUnknown("who?")))

    with LyingNode(refuse) as node:
        with pytest.raises(NamespaceUnknown):
            write_to(node, pages=7)
        assert answered == [Kind.TAKE] * 3, "of one page, of two, of four"
