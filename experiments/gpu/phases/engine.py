"""The engine's tokens on the device, in fp32, against transformers' own greedy tokens, through every tier and fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attnstore.core.layout import DType
from attnstore.testing import StoreProcess
from attnstore_worker.cache import PageStore, open_store
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.random_models import SMOLLM2_135M, random_model
from attnstore_worker.testing import MemoryStore
from experiments.gpu.phase import Phase

_BLOCK_TOKENS = 16
_DEADLINE_MS = 30_000
_QUICK_SHAPE = SMOLLM2_135M._replace(layers=2, hidden=192, intermediate=256, q_heads=3, kv_heads=1, vocabulary=512)


def run(phase: Phase) -> None:
    """Compares the tokens of each scenario."""
    shape, tokens = (_QUICK_SHAPE, 40) if phase.quick else (SMOLLM2_135M, 64)
    model = random_model(shape, DType.FP32, phase.device)
    scenarios = _Scenarios(phase, model, random_model(shape, DType.FP32), tokens)
    scenarios.run()
    if isinstance(phase.device, SimulatedDevice):
        phase.rows.check("no access to a block or slot races", not phase.device.races.found)


class _Scenarios:
    def __init__(self, phase: Phase, model: LoadedModel, reference: LoadedModel, tokens: int) -> None:
        self._phase = phase
        self._model = model
        lengths = (3, 16, 17, 50) if phase.quick else (3, 16, 17, 250, 1000)
        vocabulary = model.module.config.vocab_size
        self._prompts = [
            [(31 * at + 7 * number) % (vocabulary - 5) + 5 for at in range(size)] for number, size in enumerate(lengths)
        ]
        self._how = SamplingParams(max_tokens=tokens)
        self._expected = [_greedy(reference, prompt, tokens) for prompt in self._prompts]
        blocks = sum(-(-(size + tokens) // _BLOCK_TOKENS) for size in lengths)
        page_bytes = model.layout(_BLOCK_TOKENS).page_bytes
        self._options = EngineOptions(pool_bytes=2 * blocks * page_bytes, chunk_tokens=128, sequences_max=8)
        self._small = replace(self._options, pool_bytes=(max(lengths) + tokens + 32) // _BLOCK_TOKENS * page_bytes)

    def run(self) -> None:
        """Every scenario in turn; one that raises is a wrong check."""
        store = MemoryStore()
        self._compare("cold, and written to a store", self._options, store=store)
        pages = list(store.pages.items())
        for hits in range(1, len(pages), max(1, len(pages) // 8)):
            store.pages = dict(pages[:hits])
            self._compare(f"{hits} pages hit in a store", self._options, store=store)
        self._compare("captured decode steps", self._options, warm=True)
        self._compare("pages come back from HOST", replace(self._small, host_pool_bytes=self._options.pool_bytes), rounds=2)
        self._compare("preempted sequences", self._small, check=lambda engine: engine.batching().preemptions > 0)
        self._compare("drafts", replace(self._options, speculate=True))
        failing = MemoryStore()
        failing.failing = ("read",)
        failing.pages = dict(pages)
        self._compare("a store whose reads fail", self._options, store=failing)
        with StoreProcess("--capacity", "256MiB") as node, open_store(node.url, deadline_ms=_DEADLINE_MS) as remote:
            self._compare("written to a node", self._options, store=remote)
            self._compare("read from a node", self._options, store=remote, check=_has_read)
            node.kill()
            self._compare("a node that is gone", replace(self._options, store_deadline_ms=1_000), store=remote)

    def _compare(
        self,
        name: str,
        options: EngineOptions,
        *,
        store: PageStore | None = None,
        rounds: int = 1,
        warm: bool = False,
        check: Callable[[Engine], bool] = lambda _: True,
    ) -> None:
        try:
            with Engine(self._model, options, store=store, device=self._phase.device) as engine:
                if warm:
                    engine.warm_up()
                for _ in range(rounds):
                    sequences = engine.generate_all(self._prompts, self._how)
                    engine.check()
                engine.flush(_DEADLINE_MS)
                wrong = [
                    number
                    for number, (sequence, expected) in enumerate(zip(sequences, self._expected, strict=True))
                    if sequence.generated != expected
                ]
                held, as_wanted = engine.statistics().pool.held, check(engine)
        except Exception as error:
            self._phase.rows.check(name, ok=False, detail=f"{type(error).__name__}: {error}")
            return
        self._phase.rows.check(
            name, not wrong and held == 0 and as_wanted, f"prompts with other tokens: {wrong}; blocks held: {held}"
        )


def _has_read(engine: Engine) -> bool:
    return engine.statistics().remote.pages_read > 0


def _greedy(model: LoadedModel, prompt: list[int], tokens: int) -> list[int]:
    """Returns the tokens of transformers' own attention and cache, on the processor."""
    module = model.module
    module.set_attn_implementation("eager")
    generated: list[int] = []
    with torch.inference_mode():
        output = module(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        while True:
            generated.append(int(output.logits[0, -1].argmax()))
            if len(generated) == tokens:
                return generated
            output = module(torch.tensor([generated[-1:]]), past_key_values=output.past_key_values, use_cache=True)
