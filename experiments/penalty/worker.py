"""The worker process of the measurement: a real model behind the public API, controlled over a pipe.

Owns: the prompts and the engines. Invariant: no block is cached before a measurement, and no measurement writes to the store: only
`fill` does.

Each request is one line of JSON, a `verb` and its arguments; each answer is one line.
"""

from __future__ import annotations

import gc
import json
import pydoc_data.topics
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import block_hashes, namespace
from attnstore.core.layout import DType
from attnstore.types import PageStatus, WriteResult
from attnstore_worker.cache import CostPlanner, FetchAll, PageStore, Planner, RecomputeAll, Tier, open_store
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import load_model

_DEADLINE_MS: Final = 300_000
_FLUSH_MS: Final = 120_000
_OPTIONS: Final = EngineOptions(pool_bytes=256 << 20, store_deadline_ms=_DEADLINE_MS)
_ONE_TOKEN: Final = SamplingParams(max_tokens=1, stop_token_ids=frozenset())
_CALIBRATION_TOKENS_MAX: Final = 2048
_CALIBRATION_READS: Final = 8
_CALIBRATION_S_MAX: Final = 6.0
_DECODE_STEPS: Final = 5


@dataclass(frozen=True, slots=True)
class Start:
    """The start parameters of the process: the node itself, the node behind the link, and the transport."""

    node_url: str
    link_url: str
    transport: str
    seed: int
    threads: int


class ReadOnly:
    """A store that accepts no pages, so that a measurement finds only what it should."""

    def __init__(self, store: PageStore) -> None:
        self.register_layout = store.register_layout
        self.match = store.match
        self.read = store.read
        self.release = store.release

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[memoryview], /, *, deadline_ms: float
    ) -> WriteResult:
        """Answers that every page is already present."""
        del namespace, pages, deadline_ms
        return WriteResult((PageStatus.ALREADY_PRESENT,) * len(hashes), 0)


class Bench:
    """A model and its engines, one for each way to a first token."""

    def __init__(self, start: Start, stack: ExitStack) -> None:
        self._start = start
        self._model = load_model(None, DType.BF16)
        self._clock = MonotonicClock()
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self._text: list[int] = self._model.tokenizer(text, verbose=False).input_ids
        self._draw = random.Random(start.seed)
        self._calibration_tokens = _CALIBRATION_TOKENS_MAX
        self._behind = open_store(start.link_url, deadline_ms=_DEADLINE_MS, transport=start.transport)
        stack.enter_context(self._behind)
        self._planner = CostPlanner(self._clock, _OPTIONS.chunk_tokens)
        self._recompute = stack.enter_context(self._engine(RecomputeAll(), None))
        self._fetch = stack.enter_context(self._engine(FetchAll(_DEADLINE_MS), None))
        self._planning: Engine | None = None
        stack.callback(self._forget)

    def fill(self, contexts: list[int]) -> dict[str, Any]:
        """Computes the documents and writes their pages to the node, bypassing the link."""
        self._calibration_tokens = min(_CALIBRATION_TOKENS_MAX, max(contexts))
        with (
            open_store(self._start.node_url, deadline_ms=_DEADLINE_MS, transport=self._start.transport) as store,
            Engine(self._model, _OPTIONS, store=store) as engine,
        ):
            engine.warm_up()
            for context in sorted({*contexts, self._calibration_tokens}):
                engine.generate(self._document(context), _ONE_TOKEN)
                assert engine.flush(_FLUSH_MS), "the pages did not reach the store in time"
        return {"page_bytes": engine.layout.page_bytes, "model": self._model.name, "dtype": self._model.dtype.value}

    def calibrate(self) -> dict[str, Any]:
        """Gives a planner experience with this link: computes a prompt and fetches a few small ones."""
        self._forget()
        self._planner = CostPlanner(self._clock, _OPTIONS.chunk_tokens)
        with self._engine(RecomputeAll(), self._planner) as computing:
            computing.generate(self._document(self._calibration_tokens), _ONE_TOKEN)
        began_s = time.monotonic()
        with self._engine(FetchAll(_DEADLINE_MS), self._planner) as fetching:
            for index in range(_CALIBRATION_READS):
                fetching.generate(self._document(self._calibration_tokens)[: 130 if index % 2 else 514], _ONE_TOKEN)
                fetching.drop_cached()
                if time.monotonic() - began_s > _CALIBRATION_S_MAX:
                    break
        link = self._planner.report().links.get(Tier.REMOTE)
        self._planning = self._engine(self._planner, self._planner)
        return {"rtt_ms": link.rtt_ms, "gbit_per_s": link.gbit_per_s, "spread": link.spread} if link is not None else {}

    def measure(self, way: str, context: int, hit_rate: float) -> dict[str, Any]:
        """Measures one first token, from submission on."""
        engine = {"recompute": self._recompute, "fetch": self._fetch, "planner": self._planning}[way]
        assert engine is not None, "calibrate comes first"
        engine.drop_cached()
        sequence = engine.generate(self._prompt(context, hit_rate), _ONE_TOKEN)
        assert sequence.first_token_ms is not None
        assert sequence.admission is not None
        answer: dict[str, Any] = {
            "ttft_ms": sequence.first_token_ms - sequence.submitted_ms,
            "hit_tokens": sequence.admission.hit_tokens,
        }
        if way == "planner":
            answer["decision"] = self._planner.decisions(1)[0].as_json()
        return answer

    def decode(self, context: int) -> dict[str, Any]:
        """Measures times between tokens with the KV in the pool, and fetched over the link for each step: before it, or during the
        previous one.
        """
        engine, steps = self._fetch, _DECODE_STEPS
        engine.drop_cached()
        document = self._document(context)
        name = namespace(engine.layout, model=self._model.fingerprint, tenant_salt=_OPTIONS.tenant_salt)
        hashes = block_hashes(name, document, engine.layout.block_tokens)
        memory = memoryview(bytearray(len(hashes) * engine.layout.page_bytes))
        pages = [memory[begin : begin + engine.layout.page_bytes] for begin in range(0, len(memory), engine.layout.page_bytes)]

        def bring() -> None:
            result = self._behind.read(name, hashes, pages, lease=None, deadline_ms=_DEADLINE_MS)
            assert result.leading_hits == len(hashes), result.error

        def bring_and_step() -> None:
            bring()
            engine.step()

        sequence = engine.submit(document, SamplingParams(max_tokens=3 * steps + 4, stop_token_ids=frozenset()))
        while not sequence.generated:
            engine.step()
        times: dict[str, list[float]] = {"resident": [], "fetched": [], "prefetched": []}
        for _ in range(steps):
            times["resident"].append(self._timed_ms(engine.step))
        for _ in range(steps):
            times["fetched"].append(self._timed_ms(bring_and_step))
        for _ in range(steps):
            times["prefetched"].append(self._timed_ms(lambda: self._beside(bring, engine)))
        engine.cancel(sequence)
        return {residence: median(durations) for residence, durations in times.items()}

    def _beside(self, bring: Callable[[], None], engine: Engine) -> None:
        thread = threading.Thread(target=bring)
        thread.start()
        engine.step()
        thread.join()

    def _timed_ms(self, run: Callable[[], object]) -> float:
        began_ms = self._clock.now_ms()
        run()
        return self._clock.now_ms() - began_ms

    def _engine(self, planner: Planner, observer: CostPlanner | None) -> Engine:
        store = ReadOnly(self._behind)
        engine = Engine(self._model, _OPTIONS, store=store, planner=planner, observer=observer, clock=self._clock)
        engine.warm_up()
        return engine

    def _forget(self) -> None:
        """Ends the engine of the previous link, which holds a pool."""
        if self._planning is not None:
            self._planning.close()
            self._planning = None
        gc.collect()

    def _document(self, context: int) -> list[int]:
        """Returns the text from its own offset for each context, so that no document is a prefix of another."""
        return self._text[context : 2 * context]

    def _prompt(self, context: int, hit_rate: float) -> list[int]:
        """Returns a document's first tokens, followed, for hit rates below 1, by tokens that no store has seen."""
        known = int(context * hit_rate)
        begin = self._draw.randrange(len(self._text) - context)
        return self._document(context)[:known] + self._text[begin : begin + context - known]


def main() -> None:
    """Answers requests until the input ends."""
    start = Start(**json.loads(sys.argv[1]))
    torch.set_num_threads(start.threads)
    with ExitStack() as stack:
        bench = Bench(start, stack)
        print("ready", flush=True)
        verbs: dict[str, Callable[..., dict[str, Any]]]
        verbs = {"fill": bench.fill, "calibrate": bench.calibrate, "measure": bench.measure, "decode": bench.decode}
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(verbs[request.pop("verb")](**request)), flush=True)


if __name__ == "__main__":
    main()
