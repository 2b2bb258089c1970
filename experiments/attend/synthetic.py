"""Long contexts of real geometries, without a model: pages of random numbers, and the attention of one query row per layer.

Owns: `measure_geometry`. Only a few layers are stored and timed, because every layer costs the same; times and bytes are scaled to
all layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import torch

import attnstore
from attnstore.attention import create_attention, merge
from attnstore.client.base import AttendStream
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from experiments.attend.rows import Row, attend_ms

_BLOCK_TOKENS: Final = 16
_LEASE_MS: Final = 600_000
_DEADLINE_MS: Final = 120_000
_WRITE_PAGES: Final = 256


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model's attention; pages are bf16. `stored_layers` of its `layers` are stored and timed."""

    name: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    stored_layers: int

    @property
    def layout(self) -> attnstore.PageLayout:
        """The layout of the stored pages."""
        return attnstore.PageLayout(
            layers=self.stored_layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_tokens=_BLOCK_TOKENS,
            dtype=attnstore.DType.BF16,
        )

    @property
    def share(self) -> float:
        """All layers divided by the stored ones."""
        return self.layers / self.stored_layers


SMOLLM2: Final = Geometry("SmolLM2-135M (synthetic)", 30, 9, 3, 64, 2)
LLAMA_3_8B: Final = Geometry("Llama-3-8B (synthetic)", 32, 32, 8, 128, 1)


@dataclass(frozen=True, slots=True)
class _Half:
    """An attend stream, its open set, and memory for its answers."""

    stream: AttendStream
    set_id: int
    out: torch.Tensor
    lse: torch.Tensor


def measure_geometry(
    geometry: Geometry, context_tokens: int, profiles: Sequence[tuple[float, float]], nodes: int, *, threads: int, repeats: int
) -> list[Row]:
    """Returns rows of `resident` (for one node) and `attend` for each `(rtt_ms, gbit_per_s)`; the pages are spread evenly over
    `nodes`.

    Each node computes with `threads` cores, and so does `resident`.
    """
    torch.manual_seed(context_tokens)
    torch.set_num_threads(threads)
    blocks = context_tokens // _BLOCK_TOKENS
    layout = geometry.layout
    pool = torch.randn(blocks, *layout.shape, dtype=torch.bfloat16)
    query = torch.randn(1, geometry.q_heads, geometry.head_dim)
    scale = geometry.head_dim**-0.5
    resident_ms, out = _resident(pool, query, scale, geometry, repeats)
    rows = [_row(geometry, context_tokens, 0.0, float("inf"), "resident", 0, resident_ms, 0.0, 0.0, None)] if nodes == 1 else []
    capacity = str(layout.page_bytes * blocks // nodes + (256 << 20))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(StoreProcess("--capacity", capacity, "--attend-threads", str(threads))) for _ in range(nodes)
        ]
        parts = [pool[number::nodes] for number in range(nodes)]
        name = attnstore.namespace(layout, model=geometry.name.encode())
        hashes = attnstore.block_hashes(name, range(blocks * _BLOCK_TOKENS), _BLOCK_TOKENS)
        for number, (process, part) in enumerate(zip(processes, parts, strict=True)):
            _fill(process.url, name, layout, hashes[number::nodes], part)
        del parts
        for rtt_ms, gbit_per_s in profiles:
            with ExitStack() as linked:
                halves = []
                for number, process in enumerate(processes):
                    link = linked.enter_context(Link.to_node(process.url, f"{gbit_per_s:g}g@{rtt_ms:g}ms"))
                    client = attnstore.connect(link.url, transport="tcp", deadline_ms=_DEADLINE_MS)
                    assert isinstance(client, attnstore.Client), "one node"
                    linked.enter_context(client)
                    halves.append(_open(linked, client, name, layout, hashes[number::nodes], geometry, scale))
                step_ms, merged = _attend(halves, query, geometry.stored_layers, repeats)
            assert float((merged - out).norm() / out.norm()) < 1e-5, "partials do not merge to the whole"
            row_bytes = geometry.layers * nodes * (2 * query.numel() + geometry.q_heads) * 4
            predicted = attend_ms(resident_ms / nodes, geometry.layers, rtt_ms, row_bytes, gbit_per_s)
            rows.append(
                _row(
                    geometry,
                    context_tokens,
                    rtt_ms,
                    gbit_per_s,
                    "attend",
                    nodes,
                    step_ms * geometry.share,
                    row_bytes,
                    geometry.layers,
                    predicted,
                )
            )
    return rows


def _row(
    geometry: Geometry,
    context_tokens: int,
    rtt_ms: float,
    gbit_per_s: float,
    mode: str,
    nodes: int,
    tpot_ms: float,
    bytes_per_token: float,
    round_trips: float,
    predicted_ms: float | None,
) -> Row:
    return Row(
        geometry.name,
        context_tokens,
        rtt_ms,
        gbit_per_s,
        mode,
        nodes,
        tpot_ms,
        None,
        bytes_per_token,
        round_trips,
        None,
        None,
        predicted_ms,
    )


def _resident(
    pool: torch.Tensor, query: torch.Tensor, scale: float, geometry: Geometry, repeats: int
) -> tuple[float, torch.Tensor]:
    """Returns the milliseconds of all layers, and the result of the last stored layer."""
    attention = create_attention("cpu")
    blocks = len(pool)
    tables = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    lens, starts = torch.tensor([blocks * _BLOCK_TOKENS], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    last = query

    def step() -> None:
        nonlocal last
        for layer in range(geometry.stored_layers):
            last, _ = attention.paged_attention(query, pool, tables, lens, starts, layer=layer, scale=scale)

    return _median_ms(step, repeats) * geometry.share, last


def _attend(halves: Sequence[_Half], query: torch.Tensor, layers: int, repeats: int) -> tuple[float, torch.Tensor]:
    data = _bytes(query)
    last = query

    def step() -> None:
        nonlocal last
        for layer in range(layers):
            for half in halves:
                half.stream.ask(layer, [(half.set_id, 1)], data)
            for half in halves:
                half.stream.receive(_bytes(half.out), _bytes(half.lse))
            last, _ = merge([half.out for half in halves], [half.lse for half in halves])

    return _median_ms(step, repeats), last


def _median_ms(step: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = perf_counter()
        step()
        times.append((perf_counter() - began) * 1e3)
    return statistics.median(times[1:])  # the first call compiles


def _fill(url: str, name: bytes, layout: attnstore.PageLayout, hashes: Sequence[bytes], pages: torch.Tensor) -> None:
    with attnstore.connect(url, transport="tcp", deadline_ms=_DEADLINE_MS) as client:
        client.register_layout(name, layout)
        for begin in range(0, len(hashes), _WRITE_PAGES):
            batch = pages[begin : begin + _WRITE_PAGES].contiguous().view(torch.uint8).view(-1, layout.page_bytes)
            views: Any = [page.numpy() for page in batch]
            client.write(name, hashes[begin : begin + _WRITE_PAGES], [memoryview(view) for view in views])


def _open(
    stack: ExitStack,
    client: attnstore.Client,
    name: bytes,
    layout: attnstore.PageLayout,
    hashes: Sequence[bytes],
    geometry: Geometry,
    scale: float,
) -> _Half:
    client.register_layout(name, layout)
    found = client.match(name, [hashes], lease_ms=_LEASE_MS)
    assert found.lease is not None
    assert found.hits == (len(hashes),)
    stream = stack.enter_context(client.attend(name, q_heads=geometry.q_heads, scale=scale))
    out, lse = torch.empty(1, geometry.q_heads, geometry.head_dim), torch.empty(1, geometry.q_heads)
    return _Half(stream, stream.open(hashes, found.lease), out, lse)


def _bytes(tensor: torch.Tensor) -> memoryview:
    rows: Any = tensor.numpy()
    return memoryview(rows).cast("B")
