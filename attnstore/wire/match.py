"""The payloads of MATCH and MATCHED frames on the page channel, little-endian:

MATCH      hashes u32 for each prefix | all hashes, 32 bytes each
MATCHED    hits u32 for each prefix
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from struct import pack, unpack_from
from typing import Final

from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.wire.chunks import Buffer
from attnstore.wire.messages import join_hashes, split_hashes

COUNT_BYTES: Final = 4


def encode_prefixes(prefixes: Sequence[Sequence[bytes]]) -> bytes:
    """Returns the payload of a MATCH. Raises `InvalidArgument` for hashes of a wrong length."""
    return pack(f"<{len(prefixes)}I", *map(len, prefixes)) + join_hashes(chain.from_iterable(prefixes))


def decode_prefixes(count: int, payload: Buffer) -> list[list[bytes]]:
    """Returns the `count` prefixes of a MATCH. Raises `InvalidArgument` if they do not fill the payload exactly."""
    payload = bytes(payload)
    if count * COUNT_BYTES > len(payload):
        raise InvalidArgument(f"a MATCH of {count} prefixes has {len(payload)} bytes")
    sizes = unpack_from(f"<{count}I", payload)
    hashes = split_hashes(payload[count * COUNT_BYTES :])
    if sum(sizes) != len(hashes):
        raise InvalidArgument(f"a MATCH announces {sum(sizes)} hashes and has {len(hashes)}")
    prefixes, begin = [], 0
    for size in sizes:
        prefixes.append(hashes[begin : begin + size])
        begin += size
    return prefixes


def encode_hits(hits: Sequence[int]) -> bytes:
    """Returns the payload of a MATCHED."""
    return pack(f"<{len(hits)}I", *hits)


def decode_hits(payload: Buffer) -> tuple[int, ...]:
    """Returns the hits of a MATCHED. Raises `ProtocolError` if the size is not a multiple of a count's."""
    if len(payload) % COUNT_BYTES:
        raise ProtocolError(f"a MATCHED frame has {len(payload)} bytes")
    return unpack_from(f"<{len(payload) // COUNT_BYTES}I", payload)
