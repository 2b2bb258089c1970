"""Identity: namespaces, chained block hashes and page checksums.

Owns: the two digests that name bytes (`Namespace`, `BlockHash`), and the checksums of pages, layers and layer ranges.
Invariant: a hash depends on its inputs alone, never on the process, the platform or a seed. A worker in any language that follows
docs/pages.md therefore finds the same page. `tests/core/vectors.json` publishes test vectors.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, NewType, cast

import xxhash

from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import HASH_BYTES, KIB, SEGMENT_BLOCKS, SEGMENT_KEY_BYTES

LAYER_CHECKSUM_BYTES: Final = 8
CHECKSUM_BLOCK_BYTES: Final = KIB
"""XXH3 consumes long inputs in blocks of this size."""

BlockHash = NewType("BlockHash", bytes)
Namespace = NewType("Namespace", bytes)

_NAMESPACE_PERSON = b"attnstore-ns-v1"
_BLOCK_PERSON = b"attnstore-bk-v1"
_U32 = struct.Struct("<I")

_CHAIN_ROOT = 0xFF
"""First byte of a namespace. The first byte of a block hash is the block's index in its segment, which is smaller."""
_INDEX_BYTES = tuple(bytes((index,)) for index in range(SEGMENT_BLOCKS))
_SEGMENT = slice(1, 1 + SEGMENT_KEY_BYTES)
_AFTER_SEGMENT = slice(1 + SEGMENT_KEY_BYTES, None)
assert SEGMENT_BLOCKS <= _CHAIN_ROOT


def namespace(layout: PageLayout, *, model: bytes, tenant_salt: bytes = b"") -> Namespace:
    """Returns the 32-byte digest that separates all pages whose KV bytes could differ.

    `model` identifies the weights and every setting that changes KV bytes (RoPE, attention config): two byte strings are equal
    exactly if those are equal. `tenant_salt` separates tenants that must not share pages. BLAKE2b-256, personalised
    `attnstore-ns-v1`, of `len(salt) u32 | salt | len(model) u32 | model | layout.canonical()`, its first byte replaced by 0xFF.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=_NAMESPACE_PERSON)
    for part in (tenant_salt, model):
        digest.update(_U32.pack(len(part)))
        digest.update(part)
    digest.update(layout.canonical())
    return Namespace(bytes((_CHAIN_ROOT,)) + digest.digest()[1:])


def block_hash(parent: bytes, token_ids: Sequence[int], extra_keys: Iterable[bytes] = ()) -> BlockHash:
    """Returns the hash of the block with `token_ids` that follows `parent` (a `BlockHash`, or the `Namespace` for the first block).

    BLAKE2b-256, personalised `attnstore-bk-v1`, of `parent | count u32 | token ids u32... | for each extra key: len u32 | key`, all
    little-endian. Extra keys are anything else that changes the KV bytes, for example a LoRA id. The first eight bytes of the
    digest are replaced by the block's place: its index in its segment (one byte), and seven bytes of the digest of the segment's
    first block, the *segment key*. A segment is a run of `limits.SEGMENT_BLOCKS` blocks of a chain that stay together on one node.
    Raises `InvalidArgument` for a parent that is not 32 bytes or a token id outside u32.
    """
    if len(parent) != HASH_BYTES:
        raise InvalidArgument(f"parent hash has {len(parent)} bytes; it must have {HASH_BYTES}")
    digest = hashlib.blake2b(parent, digest_size=HASH_BYTES, person=_BLOCK_PERSON)
    digest.update(_U32.pack(len(token_ids)))
    digest.update(_u32_bytes(token_ids))
    for key in extra_keys:
        digest.update(_U32.pack(len(key)))
        digest.update(key)
    own = digest.digest()
    index = parent[0] + 1
    if index < SEGMENT_BLOCKS:
        return BlockHash(_INDEX_BYTES[index] + parent[_SEGMENT] + own[_AFTER_SEGMENT])
    return BlockHash(_INDEX_BYTES[0] + own[1:])


def segment_key(page_hash: bytes) -> bytes:
    """Returns the seven bytes shared by all blocks of a segment; they decide which node of a cluster holds a page.

    Any 32 bytes have a key, even if they are no `BlockHash`, so any page can be placed.
    """
    return page_hash[_SEGMENT]


def block_hashes(root: bytes, token_ids: Sequence[int], block_tokens: int, extra_keys: Sequence[bytes] = ()) -> list[BlockHash]:
    """Returns the chained hashes of all *complete* blocks of a token sequence; the incomplete tail has no hash."""
    if block_tokens < 1:
        raise InvalidArgument(f"block_tokens is {block_tokens}; it must be at least 1")
    hashes: list[BlockHash] = []
    parent: bytes = root
    tokens = iter(token_ids)
    for _ in range(len(token_ids) // block_tokens):
        parent = block_hash(parent, list(islice(tokens, block_tokens)), extra_keys)
        hashes.append(BlockHash(parent))
    return hashes


def keyed_hashes(parent: bytes, keys: Iterable[bytes]) -> list[BlockHash]:
    """Returns the `block_hash` of each of a chain of blocks that follow `parent`, where a block has no token ids and one extra key.

    In a tight loop, because a long prompt has thousands of blocks: a third of the time of as many calls of `block_hash`.
    """
    if len(parent) != HASH_BYTES:
        raise InvalidArgument(f"parent hash has {len(parent)} bytes; it must have {HASH_BYTES}")
    hashes: list[bytes] = []
    begin = hashlib.blake2b(digest_size=HASH_BYTES, person=_BLOCK_PERSON).copy
    index, size = parent[0] + 1, -1
    places = [place + parent[_SEGMENT] for place in _INDEX_BYTES]
    for key in keys:
        if len(key) != size:
            size = len(key)
            before_key = _U32.pack(0) + _U32.pack(size)
        digest = begin()
        digest.update(parent + before_key + key)
        own = digest.digest()
        if index >= SEGMENT_BLOCKS:
            index, places = 0, [place + own[_SEGMENT] for place in _INDEX_BYTES]
        parent = places[index] + own[_AFTER_SEGMENT]
        hashes.append(parent)
        index += 1
    return cast("list[BlockHash]", hashes)


def page_checksum(data: bytes | bytearray | memoryview) -> int:
    """Returns the XXH3-64 (seed 0) of a page or of a layer range of one. Guards against corruption, not against an adversary."""
    return xxhash.xxh3_64_intdigest(data)


def joint_checksum(parts: Iterable[bytes | bytearray | memoryview]) -> int:
    """Returns the `page_checksum` of the concatenated parts, without joining them."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def layer_checksums(data: bytes | bytearray | memoryview, layer_bytes: int) -> bytes:
    """Returns the `page_checksum` of each layer, u64 little-endian, concatenated. `data` is a whole number of layers."""
    layers = memoryview(data)
    sums = [xxhash.xxh3_64_intdigest(layers[at : at + layer_bytes]) for at in range(0, len(layers), layer_bytes)]
    return struct.pack(f"<{len(sums)}Q", *sums)


def range_checksum(layers: bytes | memoryview) -> int:
    """Returns the checksum of a layer range whose `layer_checksums` are given: their XXH3-64. Needs no byte of the page."""
    return xxhash.xxh3_64_intdigest(layers)


def _u32_bytes(token_ids: Sequence[int]) -> bytes:
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise InvalidArgument(f"token ids must be integers between 0 and 2**32 - 1: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
