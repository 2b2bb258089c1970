"""The modes with the real model: one engine per mode, over a link to a node that has the prompt's pages.

Owns: `measure`. Invariant: all modes of a context continue the same prompt greedily in fp32, and their tokens are compared with
those of the resident run.
"""

from __future__ import annotations

import math
import os
import pydoc_data.topics
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import torch

import attnstore
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import SharedUse
from experiments.attend.ping import measured_rtt_ms
from experiments.attend.rows import Row, attend_ms, fetch_ms

DEADLINE_MS: Final = 120_000
CHUNK_TOKENS: Final = 256
BLOCK_TOKENS: Final = 16
_LIST: Final = "Item {0}: the value of field {0} is unknown; see item {0}.\n"


@dataclass(frozen=True, slots=True)
class Cell:
    """One link, and the numbers of tokens to generate in the fast modes and in the slow one. An unlimited rate is loopback, without
    a relay. With a `resident_share`, modes that attend have a pool for that share of the context and leave the rest in the store.
    """

    rtt_ms: float
    gbit_per_s: float
    modes: tuple[str, ...]
    tokens: int
    fetched_tokens: int
    resident_share: float = 0.0

    @property
    def profile(self) -> str | None:
        """The link in the form that `attnstore.links.parse_link` takes; None for loopback."""
        return None if math.isinf(self.gbit_per_s) else f"{self.gbit_per_s:g}g@{self.rtt_ms:g}ms"

    @contextmanager
    def link(self, url: str) -> Iterator[str]:
        """The URL of the node at `url`, as seen through the link."""
        if self.profile is None:
            yield url
            return
        with Link.to_node(url, self.profile) as link:
            yield link.url


@dataclass(frozen=True, slots=True)
class Run:
    """One mode's tokens and times; `step_ms` of each step after the first token, and the number of its tokens."""

    generated: list[int]
    ttft_ms: float
    step_ms: list[float]
    step_tokens: list[int]
    bytes_moved: float
    round_trips: float

    @property
    def tpot_ms(self) -> float:
        """Time per token of the median step."""
        if not self.step_ms:
            return self.ttft_ms
        if len(set(self.step_tokens)) > 1:  # steps with drafts and steps without have no common median
            return sum(self.step_ms) / sum(self.step_tokens)
        return statistics.median(self.step_ms) / self.step_tokens[0]

    @property
    def accepted_per_step(self) -> float:
        """The accepted draft tokens per step."""
        return statistics.fmean(self.step_tokens) - 1 if self.step_tokens else 0.0


def documents(model: LoadedModel, tokens: int, count: int, *, repeating: bool) -> list[list[int]]:
    """Returns prompts of `tokens` tokens: Python's own documentation, or a list that continues as it began."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    prompts = []
    for number in range(count):
        text = "\n\n".join(topics[7 * number :] + topics[: 7 * number])
        if repeating:
            text = _LIST.format("A") * tokens
        prompts.append([int(token) for token in model.tokenizer(text[: tokens * 8], verbose=False).input_ids[:tokens]])
    return prompts


def measure(model: LoadedModel, prompt: list[int], cells: Sequence[Cell], *, capacity: str, threads: int) -> list[Row]:
    """Returns rows of one prompt over several links; the node computes with `threads` cores, like the worker."""
    layout = model.layout(BLOCK_TOKENS)
    context_bytes = len(prompt) // BLOCK_TOKENS * layout.page_bytes
    tokens_max = max(cell.tokens for cell in cells)
    with StoreProcess("--capacity", capacity, "--attend-threads", str(threads)) as node:
        here = resident(model, prompt, tokens_max, node.url)
        rows = [_row(model, prompt, cells[0], "resident", here, here, here.tpot_ms)]
        for cell in cells:
            rtt_ms = measured_rtt_ms(cell.profile, weight_bytes(model) // layout.layers)
            with cell.link(node.url) as url:
                for mode in cell.modes:
                    if mode == "shared_in_place":
                        run = _shared(model, prompt, cell.tokens, node.url)
                        predicted = here.tpot_ms
                    elif mode == "fetch_each_step":
                        run = _fetched(model, prompt, cell.fetched_tokens, url)
                        predicted = fetch_ms(here.tpot_ms, context_bytes, rtt_ms, cell.gbit_per_s)
                    else:
                        speculate = mode == "attend_speculative"
                        if cell.resident_share:
                            run = _left_behind(model, prompt, cell, url, speculate=speculate)
                        else:
                            run = attended(model, prompt, cell.tokens, url, speculate=speculate)
                        tokens = 1 + run.accepted_per_step
                        step_bytes = run.bytes_moved * tokens
                        step = attend_ms(here.tpot_ms, layout.layers, rtt_ms, step_bytes, cell.gbit_per_s)
                        predicted = step / tokens
                    rows.append(_row(model, prompt, cell, mode, run, here, predicted, rtt_ms))
    return rows


def weight_bytes(model: LoadedModel) -> int:
    """Returns the bytes of the model's weights, which a step reads."""
    return sum(parameter.nbytes for parameter in model.module.parameters())


def _row(
    model: LoadedModel,
    prompt: list[int],
    cell: Cell,
    mode: str,
    run: Run,
    resident: Run,
    predicted_ms: float,
    rtt_ms: float | None = None,
) -> Row:
    local = mode in ("resident", "shared_in_place")
    return Row(
        model=model.name,
        context_tokens=len(prompt),
        rtt_ms=0.0 if local else cell.rtt_ms,
        gbit_per_s=float("inf") if local else cell.gbit_per_s,
        mode=mode,
        nodes=1,
        tpot_ms=run.tpot_ms,
        ttft_ms=run.ttft_ms,
        bytes_per_token=run.bytes_moved,
        round_trips_per_token=run.round_trips,
        tokens_equal=run.generated == resident.generated[: len(run.generated)],
        accepted_per_step=run.accepted_per_step if mode == "attend_speculative" else None,
        predicted_ms=None if cell.resident_share else predicted_ms,  # the formula does not cover drafts, which have a cost
        resident_share=cell.resident_share if mode.startswith("attend") else 0.0,
        measured_rtt_ms=None if local else rtt_ms,
    )


def engine_options(model: LoadedModel, tokens: int, **more: object) -> EngineOptions:
    """Returns options with a pool for that many tokens."""
    blocks = -(-tokens // BLOCK_TOKENS) + 4
    pool_bytes = blocks * model.layout(BLOCK_TOKENS).page_bytes
    return EngineOptions(
        pool_bytes=pool_bytes,
        chunk_tokens=CHUNK_TOKENS,
        sequences_max=4,
        store_deadline_ms=DEADLINE_MS,
        **more,  # type: ignore[arg-type]
    )


@contextmanager
def store_at(url: str, transport: str) -> Iterator[attnstore.Client]:
    """A client of the node at `url`."""
    with attnstore.connect(url, transport=transport, deadline_ms=DEADLINE_MS) as client:
        assert isinstance(client, attnstore.Client), "one node"
        yield client


def resident(model: LoadedModel, prompt: list[int], tokens: int, url: str) -> Run:
    """Computes the prompt with all cores, which fills the node, and generates with everything in the pool."""
    with store_at(url, "tcp") as store, Engine(model, engine_options(model, len(prompt) + tokens), store=store) as engine:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        sequence, ttft_ms = _first_token(engine, prompt, tokens)
        torch.set_num_threads(threads)
        step_ms, step_tokens = _step_to_end(engine, sequence)
        engine.flush(DEADLINE_MS)
        return Run(sequence.generated, ttft_ms, step_ms, step_tokens, 0.0, 0.0)


def _shared(model: LoadedModel, prompt: list[int], tokens: int, url: str) -> Run:
    options = engine_options(model, CHUNK_TOKENS + len(prompt) + tokens, shared=SharedUse.IN_PLACE)
    with store_at(url, "shm") as store, Engine(model, options, store=store) as engine:
        return generate(engine, prompt, tokens)


def attended(model: LoadedModel, prompt: list[int], tokens: int, url: str, *, speculate: bool) -> Run:
    """Generates with all of the prompt's blocks in the store."""
    options = engine_options(model, 4 * CHUNK_TOKENS + tokens, attend=AttendPolicy.ALWAYS, speculate=speculate)
    with store_at(url, "tcp") as store:
        with Engine(model, options, store=store, attend_store=store) as warming:  # the node's kernels, and the known batch shapes
            generate(warming, prompt, 12 if speculate else 2)
        with Engine(model, options, store=store, attend_store=store) as engine:
            run = generate(engine, prompt, tokens)
            asked = engine.attending()
            assert asked is not None
            given = len(run.generated)
            moved = asked.bytes_sent + asked.bytes_received
            steps = engine.batching().steps
            # The first step includes the rows of the prompt's rest; a token's share is that of the rows that gave tokens.
            rows = len(prompt) % BLOCK_TOKENS or BLOCK_TOKENS
            layers = model.layout(BLOCK_TOKENS).layers
            moved_later = moved * (asked.rows - rows * layers) / asked.rows
            return Run(
                run.generated,
                run.ttft_ms,
                run.step_ms,
                run.step_tokens,
                moved_later / max(1, given - 1),
                layers * (steps - 1) / max(1, given - 1),
            )


def _left_behind(model: LoadedModel, prompt: list[int], cell: Cell, url: str, *, speculate: bool) -> Run:
    """Computes the context here, as a tenant of its own; its older blocks stay in the store for lack of room."""
    options = engine_options(
        model,
        int(len(prompt) * cell.resident_share),
        attend=AttendPolicy.BEYOND_POOL,
        speculate=speculate,
        tenant_salt=f"{cell} {speculate}".encode(),
    )
    with store_at(url, "tcp") as store, Engine(model, options, store=store, attend_store=store) as engine:
        sequence, ttft_ms = _first_token(engine, prompt, cell.tokens)
        before = engine.attending()
        step_ms, step_tokens = _step_to_end(engine, sequence)
        after = engine.attending()
        assert before is not None
        assert after is not None
        given = max(1, len(sequence.generated) - 1)
        moved = after.bytes_sent + after.bytes_received - before.bytes_sent - before.bytes_received
        round_trips = (after.round_trips - before.round_trips) / given
        return Run(sequence.generated, ttft_ms, step_ms, step_tokens, moved / given, round_trips)


def _fetched(model: LoadedModel, prompt: list[int], tokens: int, url: str) -> Run:
    """Generates each token with a new engine without KV, so the whole context crosses the link for it."""
    generated: list[int] = []
    times: list[float] = []
    moved = 0
    with store_at(url, "tcp") as store:
        for _ in range(tokens):
            with Engine(model, engine_options(model, len(prompt) + tokens), store=store) as engine:
                began = perf_counter()
                generated += engine.generate([*prompt, *generated], SamplingParams(max_tokens=1)).generated
                times.append((perf_counter() - began) * 1e3)
                moved += engine.statistics().remote.bytes_read
    return Run(generated, times[0], times[1:], [1] * (tokens - 1), moved / tokens, 1.0)


def generate(engine: Engine, prompt: list[int], tokens: int) -> Run:
    """Runs a prompt to its end."""
    sequence, ttft_ms = _first_token(engine, prompt, tokens)
    step_ms, step_tokens = _step_to_end(engine, sequence)
    return Run(sequence.generated, ttft_ms, step_ms, step_tokens, 0.0, 0.0)


def _step_to_end(engine: Engine, sequence: Prompted) -> tuple[list[float], list[int]]:
    """Returns the milliseconds of each step, and the number of its tokens."""
    step_ms, step_tokens = [], []
    while sequence.finish_reason is None:
        known, began = len(sequence.generated), perf_counter()
        engine.step()
        step_ms.append((perf_counter() - began) * 1e3)
        step_tokens.append(len(sequence.generated) - known)
    return step_ms, step_tokens


def _first_token(engine: Engine, prompt: list[int], tokens: int) -> tuple[Prompted, float]:
    """Runs a prompt to its first token. Returns the sequence and the time in milliseconds."""
    sequence = engine.submit(prompt, SamplingParams(max_tokens=tokens))
    began = perf_counter()
    while not sequence.generated and sequence.finish_reason is None:
        engine.step()
    return sequence, (perf_counter() - began) * 1e3
