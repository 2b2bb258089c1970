"""Identity against the published vectors, and the vectors against an independent implementation of the definition.

The functions named `plain_*` implement the docstrings' text with only `hashlib` and `struct`, so that an error in our code cannot
hide in the vectors.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.hashing import block_hash, block_hashes, keyed_hashes, namespace, page_checksum, segment_key
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import SEGMENT_BLOCKS

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())
ROOT = b"\xff" + bytes(range(31))
TOKEN = st.integers(0, 2**32 - 1)


def layout_of(fields: dict[str, Any]) -> PageLayout:
    return PageLayout(**{**fields, "dtype": DType(fields["dtype"])})


def plain_canonical(fields: dict[str, Any]) -> bytes:
    dtype_code = {"bf16": 1, "fp16": 2, "fp32": 3, "opaque": 4}[fields["dtype"]]
    order = ("layers", "kv_heads", "head_dim", "block_tokens")
    numbers = [fields[name] for name in order] + [dtype_code, fields["tp_rank"], fields["tp_size"]]
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def plain_blake2b(person: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32, person=person).digest()


def plain_sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def plain_block_hash(parent: bytes, token_ids: list[int], extra_keys: list[bytes]) -> bytes:
    tokens = struct.pack(f"<I{len(token_ids)}I", len(token_ids), *token_ids)
    digest = plain_blake2b(b"attnstore-bk-v1", parent + tokens + b"".join(map(plain_sized, extra_keys)))
    continues = parent[0] < SEGMENT_BLOCKS - 1
    place = bytes([parent[0] + 1]) + parent[1:8] if continues else bytes([0]) + digest[1:8]
    return place + digest[8:]


@pytest.mark.parametrize("vector", VECTORS["layouts"])
def test_layouts_have_the_published_encoding_and_sizes(vector: dict[str, Any]) -> None:
    layout = layout_of(vector["layout"])
    assert layout.canonical() == bytes.fromhex(vector["canonical"]) == plain_canonical(vector["layout"])
    assert (layout.layer_bytes, layout.page_bytes) == (vector["layer_bytes"], vector["page_bytes"])


@pytest.mark.parametrize("vector", VECTORS["namespaces"])
def test_namespaces_have_the_published_digest(vector: dict[str, Any]) -> None:
    model, salt = bytes.fromhex(vector["model"]), bytes.fromhex(vector["tenant_salt"])
    expected = bytes.fromhex(vector["namespace"])
    assert namespace(layout_of(vector["layout"]), model=model, tenant_salt=salt) == expected
    plain = plain_sized(salt) + plain_sized(model) + plain_canonical(vector["layout"])
    assert b"\xff" + plain_blake2b(b"attnstore-ns-v1", plain)[1:] == expected


@pytest.mark.parametrize("vector", VECTORS["chains"])
def test_chains_have_the_published_hashes(vector: dict[str, Any]) -> None:
    root, block_tokens, token_ids = bytes.fromhex(vector["root"]), vector["block_tokens"], vector["token_ids"]
    extra_keys = [bytes.fromhex(key) for key in vector["extra_keys"]]
    expected = [bytes.fromhex(digest) for digest in vector["hashes"]]
    assert block_hashes(root, token_ids, block_tokens, extra_keys) == expected
    parent, plain = root, []
    for begin in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = plain_block_hash(parent, token_ids[begin : begin + block_tokens], extra_keys)
        plain.append(parent)
    assert plain == expected


@pytest.mark.parametrize("vector", VECTORS["checksums"])
def test_checksums_are_the_published_ones(vector: dict[str, Any]) -> None:
    data = bytes(index % 251 for index in range(vector["size_bytes"]))
    assert page_checksum(data) == page_checksum(memoryview(bytearray(data))) == int(vector["checksum"], 16)


def test_the_checksum_is_xxh3_with_seed_zero() -> None:
    # The value that the authors of xxHash publish for the empty input.
    assert page_checksum(b"") == 0x2D06800538D394C2


def test_namespaces_of_the_vectors_all_differ() -> None:
    digests = [vector["namespace"] for vector in VECTORS["namespaces"]]
    assert len(set(digests)) == len(digests)


def test_salt_and_model_cannot_be_shifted_into_each_other() -> None:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=1)
    assert namespace(layout, model=b"bc", tenant_salt=b"a") != namespace(layout, model=b"c", tenant_salt=b"ab")


def test_the_blocks_of_a_segment_share_its_key_and_segments_do_not() -> None:
    hashes = block_hashes(ROOT, range(3 * SEGMENT_BLOCKS), 1)
    keys = [segment_key(page_hash) for page_hash in hashes]
    heads = [segment_key(hashes[index]) for index in (0, SEGMENT_BLOCKS, 2 * SEGMENT_BLOCKS)]
    assert keys == [heads[index // SEGMENT_BLOCKS] for index in range(len(hashes))]
    assert len(set(heads)) == 3


def test_sequences_that_differ_in_their_first_block_differ_in_their_segment_key() -> None:
    assert segment_key(block_hash(ROOT, [1])) != segment_key(block_hash(ROOT, [2]))


@given(tokens=st.lists(TOKEN, max_size=20), block_tokens=st.integers(1, 6), cut=st.integers(0, 20))
def test_a_chain_is_a_prefix_of_the_chain_of_a_longer_sequence(tokens: list[int], block_tokens: int, cut: int) -> None:
    whole = block_hashes(ROOT, tokens, block_tokens)
    part = block_hashes(ROOT, tokens[:cut], block_tokens)
    assert len(whole) == len(tokens) // block_tokens
    assert part == whole[: len(part)]


@given(tokens=st.lists(TOKEN, min_size=4, max_size=12), index=st.integers(0, 3), other=TOKEN)
def test_changing_a_token_changes_its_block_and_every_later_one(tokens: list[int], index: int, other: int) -> None:
    changed = [*tokens[:index], other, *tokens[index + 1 :]]
    before, after = block_hashes(ROOT, tokens, 2), block_hashes(ROOT, changed, 2)
    same = [left == right for left, right in zip(before, after, strict=True)]
    first = len(before) if tokens == changed else index // 2
    assert same == [True] * first + [False] * (len(before) - first)


@given(keys=st.lists(st.binary(max_size=4), max_size=4), others=st.lists(st.binary(max_size=4), max_size=4))
def test_extra_keys_are_told_apart_by_content_order_and_boundaries(keys: list[bytes], others: list[bytes]) -> None:
    assert (block_hash(ROOT, [1], keys) == block_hash(ROOT, [1], others)) == (keys == others)


def test_tokens_and_extra_keys_cannot_be_shifted_into_each_other() -> None:
    assert block_hash(ROOT, [1, 4, 7]) != block_hash(ROOT, [1], [struct.pack("<I", 7)])


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], ["a"]])
def test_token_ids_outside_u32_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(InvalidArgument, match="token ids"):
        block_hash(ROOT, tokens)


@pytest.mark.parametrize("parent", [b"", bytes(31), bytes(33)])
def test_a_parent_of_the_wrong_length_is_refused(parent: bytes) -> None:
    with pytest.raises(InvalidArgument, match="parent hash"):
        block_hash(parent, [1])
    with pytest.raises(InvalidArgument, match="parent hash"):
        keyed_hashes(parent, [b"key"])


@pytest.mark.parametrize("key_bytes", [0, 1, 32, 200])
def test_blocks_of_keys_have_the_hashes_of_blocks_with_one_extra_key(key_bytes: int) -> None:
    parent, hashes = ROOT, []
    keys = [bytes((index,)) * key_bytes for index in range(2 * SEGMENT_BLOCKS + 3)]
    for key in keys:
        parent = block_hash(parent, (), (key,))
        hashes.append(parent)
    assert keyed_hashes(ROOT, keys) == hashes
    assert keyed_hashes(hashes[69], keys[70:]) == hashes[70:]


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="block_tokens"):
        block_hashes(ROOT, [1, 2], 0)
