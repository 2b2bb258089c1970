"""Test doubles for the worker's interfaces: a store that fails on purpose, a planner with a fixed plan, a tiny model, a group of
caches, a worker in a process of its own.

Owns: `MemoryStore`, `FixedPlanner`, `write_tiny_model`, `single_group` and `WorkerProcess`. Invariant of the store: it reports what
a real client would report; a page whose status is not OK leaves garbage in its buffer, as a broken transfer does.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import transformers

from attnstore.core.layout import PageLayout
from attnstore.errors import NamespaceUnknown
from attnstore.types import Lease, MatchResult, PageStatus, ReadResult, WriteResult
from attnstore_worker.cache import OnLayer
from attnstore_worker.cache.moving.load import Load, LoadPlan, Prompt, SearchPlan
from attnstore_worker.file_digests import cache_dir
from attnstore_worker.model.conversion import converted_model
from attnstore_worker.model_source import GgufSource, find_model, weights_digest
from attnstore_worker.vllm.page_groups import PageGroup

_GARBAGE = 0xA5
_END_S_MAX = 60.0


def always_ok(_: int) -> PageStatus:
    """Every page arrives."""
    return PageStatus.OK


def ignore(_: object) -> None:
    """No-op."""


def _leading(true: Iterable[bool]) -> int:
    return sum(1 for _ in takewhile(bool, true))


class MemoryStore:
    """Keeps pages in a dictionary. Faults are set as attributes, at any time.

    read_status: returns the status of the page at each position of a read, if the page is stored.
    on_page, before_layer: called with the hash of each page, or the number of each layer, that is about to be read.
    write_verdict: the verdict on every new page; the page is stored only with STORED.
    failing, error: calls named in `failing` ("register_layout", "match", "read", "write", "release") raise `error`.
    gate: reads and writes wait for it, for as long as it takes.
    lease_ms: the lease requested by each match.
    """

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}
        self.namespaces: set[bytes] = set()
        self.layouts: dict[bytes, PageLayout] = {}
        self.leases: set[bytes] = set()
        self.lease_ms: list[int] = []
        self.calls: list[str] = []
        self.read_status: Callable[[int], PageStatus] = always_ok
        self.on_page: Callable[[bytes], None] = ignore
        self.before_layer: Callable[[int], None] = ignore
        self.write_verdict = PageStatus.STORED
        self.failing: Collection[str] = ()
        self.error: Exception = RuntimeError("the store failed on purpose")
        self.gate = threading.Event()
        self.gate.set()

    def register_layout(self, namespace: bytes, layout: PageLayout, /, *, deadline_ms: float | None = None) -> int:  # noqa: ARG002
        """Registers the namespace."""
        self._enter("register_layout")
        self.namespaces.add(namespace)
        self.layouts[namespace] = layout
        return layout.page_bytes

    def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], /, *, lease_ms: int, deadline_ms: float | None = None
    ) -> MatchResult:
        """Returns the leading hits of each prefix."""
        del deadline_ms
        self._enter("match", namespace)
        self.lease_ms.append(lease_ms)
        hits = tuple(next((i for i, page in enumerate(prefix) if page not in self.pages), len(prefix)) for prefix in prefixes)
        if not any(hits) or not lease_ms:
            return MatchResult(hits, None)
        lease = Lease(len(self.calls).to_bytes(16, "big"), lease_ms)
        self.leases.add(lease.lease_id)
        return MatchResult(hits, lease)

    def read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        /,
        *,
        lease: Lease | None,
        deadline_ms: float,
        on_layer: OnLayer | None = None,
    ) -> ReadResult:
        """Copies pages out; pages that fail by `read_status` become garbage. A read by layers fails them in the last layer."""
        del lease, deadline_ms
        self._enter("read", namespace)
        self.gate.wait()
        if on_layer is not None:
            statuses = self._read_by_layers(self.layouts[namespace], hashes, buffers, on_layer)
        else:
            statuses = [self._read_page(i, page, buffer) for i, (page, buffer) in enumerate(zip(hashes, buffers, strict=True))]
        return ReadResult(tuple(statuses), sum(b.nbytes for b, status in zip(buffers, statuses, strict=True) if status.is_hit))

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[memoryview], /, *, deadline_ms: float
    ) -> WriteResult:
        """Copies pages in."""
        del deadline_ms
        self._enter("write", namespace)
        self.gate.wait()
        verdicts = []
        for page_hash, page in zip(hashes, pages, strict=True):
            verdict = PageStatus.ALREADY_PRESENT if page_hash in self.pages else self.write_verdict
            if verdict is PageStatus.STORED:
                self.pages[page_hash] = bytes(page)
            verdicts.append(verdict)
        stored = verdicts.count(PageStatus.STORED)
        return WriteResult(tuple(verdicts), stored * (pages[0].nbytes if pages else 0))

    def release(self, lease: Lease, /) -> bool:
        """Ends a lease."""
        self._enter("release")
        self.leases.discard(lease.lease_id)
        return True

    def _read_page(self, index: int, page_hash: bytes, buffer: memoryview) -> PageStatus:
        if page_hash not in self.pages:
            return PageStatus.MISSING
        self.on_page(page_hash)
        status = self.read_status(index)
        buffer[:] = self.pages[page_hash] if status.is_hit else bytes([_GARBAGE]) * buffer.nbytes
        return status

    def _read_by_layers(
        self, layout: PageLayout, hashes: Sequence[bytes], buffers: Sequence[memoryview], on_layer: OnLayer
    ) -> list[PageStatus]:
        found = [page in self.pages for page in hashes]
        statuses = [self.read_status(i) if there else PageStatus.MISSING for i, there in enumerate(found)]
        whole = _leading(status.is_hit for status in statuses)
        for layer in range(layout.layers):
            self.before_layer(layer)
            begin, end = layout.layer_slice(layer, layer + 1)
            last = layer == layout.layers - 1
            for page, there, status, buffer in zip(hashes, found, statuses, buffers, strict=True):
                if there:
                    intact = status.is_hit or not last
                    buffer[begin:end] = self.pages[page][begin:end] if intact else bytes([_GARBAGE]) * (end - begin)
            on_layer(layer, whole if last else _leading(found))
        return statuses

    def _enter(self, call: str, namespace: bytes | None = None) -> None:
        self.calls.append(call)
        if call in self.failing:
            raise self.error
        if namespace is not None and namespace not in self.namespaces:
            raise NamespaceUnknown("the namespace was never registered here")


class FixedPlanner:
    """Searches the tiers for up to a minute, computing the blocks before `searching`, then returns `plan`; `gives_up` ends any
    load.
    """

    def __init__(self, plan: LoadPlan | None, *, searching: int = 0, gives_up: bool = False) -> None:
        self._plan = plan
        self.gives_up = gives_up
        self._search = SearchPlan(60_000.0, searching)

    def search(self, prompt: Prompt) -> SearchPlan:
        """Always searches."""
        del prompt
        return self._search

    def plan(self, load: Load) -> LoadPlan | None:
        """Returns the plan."""
        del load
        return self._plan

    def replan(self, load: Load, now_ms: float) -> LoadPlan | None:
        """Returns the same plan, unless `gives_up`."""
        del now_ms
        return None if self.gives_up else load.plan

    def prefetches(self, prompt: Prompt) -> bool:
        """Never prefetches."""
        del prompt
        return False


def write_tiny_model(folder: Path, *, context_tokens_max: int = 512, kv_heads: int = 2) -> None:
    """Writes a Hugging Face folder with a random two-layer model of the default model's kind, and with its tokenizer. Two query
    heads share a head of keys and values.
    """
    source = find_model()
    assert isinstance(source, GgufSource)
    real = converted_model(source, weights_digest(source), cache_dir()).path
    transformers.AutoTokenizer.from_pretrained(str(real)).save_pretrained(str(folder))
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        vocab_size=49152,
        max_position_embeddings=context_tokens_max,
        initializer_range=0.2,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))


class WorkerProcess:
    """A command that serves an endpoint and prints its URL on standard error; a context manager. `url` is the endpoint's.

    Raises `RuntimeError` with the command's output if it ends before that.
    """

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self._lines: list[str] = []
        for line in self.process.stderr:
            self._lines.append(line)
            if " on http://" in line:
                break
        else:
            self.process.wait()
            self.process.stderr.close()
            raise RuntimeError(f"the worker did not start:\n{self.log}")
        self.url = line.split(" on ")[1].strip()
        # Its later output is read all the time, because a full pipe would block it.
        self._drain = threading.Thread(target=self._lines.extend, args=(self.process.stderr,), daemon=True)
        self._drain.start()

    @classmethod
    def serving(cls, model: Path, *options: str) -> Self:
        """Returns `attnstore-worker serve` with that model, one thread and a small pool, on a free port."""
        command = ("-m", "attnstore_worker.cli", "serve", "--port", "0", "--model", str(model), "--threads", "1", "--pool", "8MiB")
        return cls(sys.executable, *command, *options)

    @property
    def log(self) -> str:
        """The output so far on standard error."""
        return "".join(self._lines)

    def wait(self, within_s: float = _END_S_MAX) -> int:
        """Returns the exit status, once it has ended by itself; then `log` is complete. Raises `subprocess.TimeoutExpired`."""
        status = self.process.wait(within_s)
        self._drain.join(within_s)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.wait()
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()


def single_group(layout: PageLayout, layer_names: tuple[str, ...]) -> PageGroup:
    """Returns vLLM's only group of caches, of full attention, whose pages have one block of this layout."""
    return PageGroup(
        index=0,
        layer_names=layer_names,
        layer_bytes=(layout.page_bytes // len(layer_names),) * len(layer_names),
        block_tokens=layout.block_tokens,
        page_blocks=1,
        page_hashes=1,
        window=None,
        state=False,
        heads=None,
        block_layout=layout,
        layout=layout,
    )
