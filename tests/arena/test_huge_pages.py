"""Huge pages made beside everything else: whose bytes they keep, when they stop, and a system that makes none."""

from __future__ import annotations

import os
import random
import threading

import pytest

from attnstore import memory_files
from attnstore.arena import SharedArena
from attnstore.arena.huge_pages import HugePages
from attnstore.core.slots import Slot
from attnstore.memory_files import HUGE_PAGE_BYTES
from tests.samples import eventually

EXTENT_BYTES = 3 * HUGE_PAGE_BYTES


@pytest.fixture
def collapsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the pieces that the system was asked for."""
    asked: list[int] = []
    collapse = memory_files.collapse

    def noted(part: memoryview) -> bool:
        asked.append(len(part))
        return collapse(part)

    monkeypatch.setattr(memory_files, "collapse", noted)
    return asked


@pytest.fixture
def extent() -> memoryview:
    file, mapping = memory_files.create("test", EXTENT_BYTES + 4096)
    os.close(file)
    return mapping


def test_an_extent_is_asked_for_a_huge_page_at_a_time(collapsed: list[int], extent: memoryview) -> None:
    pages = HugePages()
    pages.make(extent)
    assert eventually(lambda: len(collapsed) in (1, 3))
    pages.close()
    assert set(collapsed) == {HUGE_PAGE_BYTES}


def test_writers_and_readers_meanwhile_find_what_they_wrote(extent: memoryview) -> None:
    data = random.Random(2).randbytes(len(extent))
    extent[:] = data
    pages = HugePages()
    pages.make(extent)
    for number in range(200):
        begin = number * 30_011 % (len(extent) - 64)
        word = bytes((number,)) * 64
        extent[begin : begin + 64] = word
        assert extent[begin : begin + 64] == word
        extent[begin : begin + 64] = data[begin : begin + 64]
    pages.close()
    assert extent == data


def test_a_system_that_makes_none_is_not_asked_again(extent: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(part: memoryview) -> bool:
        asked.append(len(part))
        return False

    monkeypatch.setattr(memory_files, "collapse", refuse)
    pages = HugePages()
    for _ in range(3):
        pages.make(extent)
    assert eventually(lambda: bool(asked))
    pages.close()
    assert len(asked) == 1


def test_closing_waits_for_the_piece_at_hand_and_lets_the_extents_go(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(part: memoryview) -> bool:
        del part
        begun.set()
        return goes_on.wait(10)

    monkeypatch.setattr(memory_files, "collapse", slow)
    arena = SharedArena(2 * EXTENT_BYTES, EXTENT_BYTES)
    for extent in range(2):
        arena.view(Slot(extent, 0, 4096, generation=extent + 1, tenancy=1))[:] = b"x" * 4096
    assert begun.wait(10)
    closer = threading.Thread(target=arena.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    goes_on.set()
    closer.join(10)
    assert not closer.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "attnstore-huge-pages"]


def test_extents_that_nobody_uses_are_left_alone(collapsed: list[int]) -> None:
    arena = SharedArena(2 * EXTENT_BYTES, EXTENT_BYTES)
    arena.close()
    assert collapsed == []
