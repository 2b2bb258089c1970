"""Incremental text: the pieces join to the whole text; characters and stop strings are never cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore_worker.engine.text import TextStream
from attnstore_worker.model import LoadedModel


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(token_ids).decode(errors="replace")


def stream(data: bytes, *stops: str) -> list[str]:
    text = TextStream(decode_bytes, stops)
    pieces = []
    for byte in data:
        pieces.append(text.push(byte))
        if text.stopped:
            break
    return [*pieces, text.finish()]


@given(st.text(), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_pieces_join_to_the_text_before_the_first_stop_string(whole: str, stops: list[str]) -> None:
    cuts = [index for stop in stops if (index := whole.find(stop)) >= 0]
    # A stop string that ends earlier is found first, even if a longer one began before it.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    seen = whole[: min(ends)] if ends else whole
    expected = whole[: min(seen.find(stop) for stop in stops if stop in seen)] if cuts else whole
    assert "".join(stream(whole.encode(), *stops)) == expected


def test_half_a_character_is_held_until_it_is_whole() -> None:
    assert stream("a€b".encode()) == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert "".join(stream("a€".encode()[:-1])).startswith("a\N{REPLACEMENT CHARACTER}")


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    assert len("".join(stream(b"\xff" * 100)[:-1])) >= 90


def test_what_may_begin_a_stop_string_is_held() -> None:
    assert stream(b"one STO two", "STOP")[4:8] == ["", "", "", "STO "]


def test_the_real_tokenizer_streams_what_it_decodes_at_once(model: LoadedModel) -> None:
    whole = "The café costs 3 € — naïve? 日本語 🙂 ok.\n\n  Two  spaces."
    token_ids = model.tokenizer(whole).input_ids
    text = TextStream(model.tokenizer.decode)
    assert "".join([*(text.push(token) for token in token_ids), text.finish()]) == whole


@pytest.mark.parametrize("stops", [(), ("b",)])
def test_nothing_is_given_out_for_nothing(stops: tuple[str, ...]) -> None:
    assert TextStream(decode_bytes, stops).finish() == ""
