"""Runs steps on a device that uses Triton: persistent inputs, captured decode steps, and tokens drawn on the device.

Owns: `DeviceRunner`. Invariants: between the inputs and the tokens of a step the host reads nothing from the device; a captured
step computes what the same step computes without being captured; a step for which the device has too little memory is computed in
parts, and only a sequence whose chunk does not fit alone fails.

A step whose chunks all have one token, without drafts, late layers or blocks in the store, is replayed from a graph, one for each
number of rows in `_buckets`. Rows that no sequence uses store nothing and see nothing.
Shape: `capture_cudagraph` of nano-vllm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from attnstore_worker.cache.attending.contexts import RemoteAttention
from attnstore_worker.cache.attending.step import RemoteStep
from attnstore_worker.device.base import Device, Event, Graph, Wait
from attnstore_worker.engine.device_sampler import NOT_FINITE, draw
from attnstore_worker.engine.runner import Drawn, note_accesses, noting_accesses
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.engine.speculative import DRAFTS_MAX
from attnstore_worker.engine.step_tables import Inputs, Sizes, StepTables
from attnstore_worker.errors import LogitsNotFinite, OutOfDeviceMemory, SequenceFailed
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.loading import LoadedModel
from attnstore_worker.options import SchedulerLimits

_BUCKET: Final = 8
_OTHERS: Final = 2
"""Sequences that run beside those of the scheduler: one that warms the engine up, and one that probes it."""

_log = logging.getLogger(__name__)


class DeviceRunner:
    """See `Runner`. `pool` is memory of `device`; a step has at most `sizes`. `before_step` is called before every step: see
    `CacheManager.before_step`.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: Tensor,
        attention: AttentionBackend,
        remote: RemoteAttention | None,
        device: Device,
        sizes: Sizes,
        *,
        before_step: Callable[[], None],
    ) -> None:
        self._decoder = model.decoder
        self._pool = pool
        self._attention = attention
        self._remote = remote
        self._device = device
        self._before_step = before_step
        self._tables = StepTables(device, sizes)
        self._tokens = device.pinned(sizes.tokens, dtype=torch.int64)
        self._graphs: dict[int, Graph] = {}
        self._captured: dict[int, Tensor] = {}
        """The logits of each graph's last replay."""

    def warm_up(self) -> None:
        """Captures decode steps, the largest first, because the others share its memory. Too little memory for one leaves it out,
        and the smaller ones are tried.
        """
        if not self._decoder.capturable:
            return
        for rows in reversed(_buckets(self._tables.sizes.sequences)):
            work = partial(self._compute_captured, rows, self._tables.padding(rows))
            try:
                with self._device.submitting():
                    work()  # compiles its kernels, which no capture may do
                self._graphs[rows] = self._device.capture(work)
            except OutOfDeviceMemory as error:
                self._captured.pop(rows, None)
                _log.warning("decode steps of %d sequences are not captured: %s", rows, error)

    def run(self, chunks: Items[Chunk], before_layer: Callable[[int], None] = at_once) -> Drawn:
        """See `Runner.run`. Raises `OutOfDeviceMemory` for a step that is not repeated: pages arrive or nodes are asked in it."""
        try:
            return self._run(chunks, before_layer)
        except OutOfDeviceMemory as error:
            if before_layer is not at_once or self._remote is not None:
                raise
            refused = str(error)
        # After the handler, whose traceback holds the tensors of the step.
        return _InParts(self._parts_of(chunks, refused))

    def _parts_of(self, chunks: Items[Chunk], refused: str) -> list[tuple[_DeviceDrawn, int] | str]:
        """Returns for each chunk of a refused step what was drawn, with the chunk's place in it, or the reason that it failed."""
        _log.warning("a step of %d sequences does not fit: %s", len(chunks), refused)
        if len(chunks) == 1:
            return [refused]
        half = len(chunks) // 2
        return self._part(chunks[:half]) + self._part(chunks[half:])

    def _part(self, chunks: Items[Chunk]) -> list[tuple[_DeviceDrawn, int] | str]:
        try:
            drawn = self._run(chunks, at_once)
            drawn.read()
            return [(drawn, index) for index in range(len(chunks))]
        except OutOfDeviceMemory as error:
            refused = str(error)
        return self._parts_of(chunks, refused)

    def _run(self, chunks: Items[Chunk], before_layer: Callable[[int], None]) -> _DeviceDrawn:
        with self._device.submitting(), torch.inference_mode():
            inputs, logits = self._logits(chunks, before_layer, self._remote)
            if len(inputs.rows) == 0:
                return _DeviceDrawn(self._device, chunks, logits, self._tokens[:0], None)
            greedy = all(chunk.sequence.sampling.temperature == 0.0 for chunk in chunks if chunk.gives_token)
            return self._drawn(chunks, inputs, logits, greedy=greedy)

    def draft_resident(self, chunks: Items[Chunk], counts: Items[int]) -> list[list[int]]:
        """See `Runner.draft_resident`. Each step takes its tokens from the one before on the device; all are read at the end."""
        rows = self._graph_rows(chunks)
        whole = [replace(chunk, drafts=(0,) * (count - 1)) for chunk, count in zip(chunks, counts, strict=True)]
        drawn: list[Tensor] = []
        with self._device.submitting(), torch.inference_mode():
            self._before_step()
            note_accesses(self._device, whole, None)
            for inputs in self._tables.fill_drafts(chunks, counts, rows):
                if drawn:
                    inputs.token_ids.index_put_((inputs.rows,), drawn[-1][: len(inputs.rows)])
                logits = self._replayed(rows, inputs) if rows is not None else self._computed(inputs, at_once, None)
                # `NOT_FINITE` is no token that the next step could compute.
                drawn.append(draw(logits, inputs, greedy=True).clamp_min(0))
            tokens = self._tokens[: sum(counts)]
            event = self._device.transfer(torch.cat(drawn), tokens)
        known = iter(_read(self._device, tokens, event))
        drafts: list[list[int]] = [[] for _ in chunks]
        for step in drawn:
            for own in drafts[: len(step)]:
                own.append(next(known))
        return drafts

    def _drawn(self, chunks: Items[Chunk], inputs: Inputs, logits: Tensor, *, greedy: bool) -> _DeviceDrawn:
        """Draws from every row, and submits the transfer of the tokens."""
        tokens = self._tokens[: len(inputs.rows)]
        event = self._device.transfer(draw(logits, inputs, greedy=greedy), tokens)
        return _DeviceDrawn(self._device, chunks, logits, tokens, event)

    def _logits(
        self, chunks: Items[Chunk], before_layer: Callable[[int], None], attended: RemoteAttention | None
    ) -> tuple[Inputs, Tensor]:
        self._before_step()
        remote = None
        if attended is not None:
            # In the order of the rows of the step, as everything here.
            remote = attended.step(
                [(chunk.sequence.attend.prefix, chunk.begin, chunk.tokens) for chunk in self._tables.ordered(chunks)]
            )
        if remote is None and before_layer is at_once and (rows := self._graph_rows(chunks)) is not None:
            inputs = self._tables.fill(chunks, decode_rows=rows)
            note_accesses(self._device, chunks, None)
            return inputs, self._replayed(rows, inputs)
        inputs = self._tables.fill(chunks)
        if self._device.accesses is not None:
            before_layer = noting_accesses(self._device, chunks, before_layer)
        return inputs, self._computed(inputs, before_layer, remote)

    def _replayed(self, rows: int, inputs: Inputs) -> Tensor:
        self._graphs[rows].replay()
        return self._captured[rows][: len(inputs.rows)]

    def _computed(self, inputs: Inputs, before_layer: Callable[[int], None], remote: RemoteStep | None) -> Tensor:
        step = PagedStep(
            backend=self._attention,
            pool=self._pool,
            slot_blocks=inputs.slot_blocks,
            slot_offsets=inputs.slot_offsets,
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            query_starts=inputs.query_starts,
            before_layer=before_layer,
            remote=remote,
        )
        return self._decoder.logits(inputs.token_ids, inputs.positions, inputs.rows, step)

    def _compute_captured(self, rows: int, inputs: Inputs) -> None:
        """Computes the logits of all rows of a decode step, of which the replayed step selects its own."""
        with torch.inference_mode():
            self._captured[rows] = self._computed(inputs, at_once, None)

    def _graph_rows(self, chunks: Items[Chunk]) -> int | None:
        """Returns the rows of the graph for these chunks; None if there is none."""
        if not self._graphs or any(chunk.tokens != 1 or not chunk.gives_token for chunk in chunks):
            return None
        needed = self._tables.decode_rows(chunks)
        return min((rows for rows in self._graphs if rows >= needed), default=None)


class _DeviceDrawn:
    """See `Drawn`. Waits for the device when the first token is asked for; valid until the next run."""

    def __init__(self, device: Device, chunks: Items[Chunk], logits: Tensor, tokens: Tensor, event: Event | None) -> None:
        self._device = device
        self._chunks = chunks
        self._logits = logits
        self._tokens = tokens
        self._event = event
        self._known: list[int] | None = None
        sizes = [1 + len(chunk.drafts) if chunk.gives_token else 0 for chunk in chunks]
        self._parts = [slice(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]

    def read(self) -> None:
        """Reads everything now, so that it stays valid after the next run."""
        self._tokens_read()
        if any(chunk.sequence.sampling.logits for chunk in self._chunks):
            self._logits = self._logits.cpu()

    def rows(self, index: int) -> list[int]:
        """Returns what was drawn from each row of a chunk."""
        return self._tokens_read()[self._parts[index]]

    def _tokens_read(self) -> list[int]:
        if self._known is None:
            self._known = _read(self._device, self._tokens, self._event) if self._event is not None else []
        return self._known

    def tokens(self, index: int) -> list[int]:
        """See `Drawn.tokens`."""
        chunk = self._chunks[index]
        tokens: list[int] = []
        if not chunk.gives_token:
            return tokens
        for token_id, guess in zip(self.rows(index), [*chunk.drafts, None], strict=True):
            if token_id == NOT_FINITE:
                if not tokens:
                    raise LogitsNotFinite("the largest logit is not finite: the model computed no token for this sequence")
                break
            tokens.append(token_id)
            if token_id != guess:
                break
        return tokens

    def logits(self, index: int) -> Tensor:
        """See `Drawn.logits`."""
        return self._logits[self._parts[index]].cpu()


def _read(device: Device, tokens: Tensor, event: Event) -> list[int]:
    """Waits for the transfer of tokens, and returns them."""
    event.wait(Wait.TOKENS_AFTER_COMPUTE)
    if device.accesses is not None:
        device.accesses.host(tokens, [0], writes=False)
    ids: list[int] = tokens.tolist()
    return ids


class _InParts:
    """See `Drawn`. A step that was computed in parts: for each chunk the part and its place there, or the reason that it failed."""

    def __init__(self, parts: Items[tuple[_DeviceDrawn, int] | str]) -> None:
        self._parts = parts

    def tokens(self, index: int) -> list[int]:
        """See `Drawn.tokens`. Raises `SequenceFailed` for a chunk that does not fit alone."""
        part = self._parts[index]
        if isinstance(part, str):
            raise SequenceFailed(f"a step of this sequence alone does not fit: {part}")
        drawn, at = part
        return drawn.tokens(at)

    def logits(self, index: int) -> Tensor:
        """See `Drawn.logits`."""
        part = self._parts[index]
        assert not isinstance(part, str)
        drawn, at = part
        return drawn.logits(at)


def step_sizes(limits: SchedulerLimits, blocks: int) -> Sizes:
    """Returns the sizes of the steps of a scheduler's sequences, with at most `blocks` blocks each, and of others beside them."""
    sequences = -(-(limits.sequences_max + _OTHERS) // _BUCKET) * _BUCKET
    return Sizes(limits.step_tokens + sequences * DRAFTS_MAX, sequences, blocks)


def _buckets(sequences: int) -> list[int]:
    """Returns 1, 2, 4 and the multiples of 8 up to `sequences`, which is one."""
    return [1, 2, 4, *range(_BUCKET, sequences + 1, _BUCKET)]
