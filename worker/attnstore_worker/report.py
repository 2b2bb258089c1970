"""The costs of one generation.

Owns: `GenerationReport`, the JSON of `attnstore-worker generate --json`. Units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnstore_worker.engine import Engine, Sequence


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """One finished sequence.

    `ttft_ms` is the time from submission, with the model loaded, to the first token, including `match_ms` and `read_ms`. `tpot_ms`
    is the mean time of each further token. `kv_bytes_used` is the memory of the pool that the sequence held at its end;
    `kv_bytes_contiguous` is what a reservation of the model's longest context would have taken.
    """

    model: str
    dtype: str
    prompt_tokens: int
    hit_tokens: int
    hit_tokens_local: int
    hit_tokens_remote: int
    hit_tokens_by_tier: dict[str, int]
    ttft_ms: float
    match_ms: float
    read_ms: float
    tpot_ms: float
    load_ms: float
    flush_ms: float
    bytes_read: int
    bytes_written: int
    pages_not_written: int
    kv_bytes_used: int
    kv_bytes_contiguous: int
    finish_reason: str
    store_error: str | None
    tokens: list[int]
    text: str

    def summary(self) -> str:
        """Returns one line of text."""
        return (
            f"{self.prompt_tokens} prompt tokens, {self.hit_tokens} from cache ({self.hit_tokens_remote} over the network); "
            f"TTFT {self.ttft_ms:.0f} ms, {self.tpot_ms:.1f} ms per token; "
            f"{self.bytes_read / 1e6:.1f} MB read, {self.bytes_written / 1e6:.1f} MB written"
        )


def generation_report(engine: Engine, sequence: Sequence, *, load_ms: float, flush_ms: float) -> GenerationReport:
    """Returns the report on a finished sequence, after write-behind was flushed."""
    admission = sequence.admission
    assert admission is not None
    assert sequence.first_token_ms is not None
    assert sequence.finished_ms is not None
    assert sequence.finish_reason is not None
    statistics = engine.statistics()
    layout = engine.layout
    text: str = engine.model.tokenizer.decode(sequence.generated, skip_special_tokens=True)
    return GenerationReport(
        model=engine.model.name,
        dtype=engine.model.dtype.value,
        prompt_tokens=sequence.prompt_tokens,
        hit_tokens=admission.hit_tokens,
        hit_tokens_local=admission.local_tokens,
        hit_tokens_remote=admission.remote_tokens,
        hit_tokens_by_tier={tier.value: tokens for tier, tokens in admission.hit_tokens_by_tier().items()},
        ttft_ms=sequence.first_token_ms - sequence.submitted_ms,
        match_ms=admission.match_ms,
        read_ms=admission.read_ms,
        tpot_ms=(sequence.finished_ms - sequence.first_token_ms) / max(1, len(sequence.generated) - 1),
        load_ms=load_ms,
        flush_ms=flush_ms,
        bytes_read=statistics.remote.bytes_read,
        bytes_written=statistics.remote.bytes_written,
        pages_not_written=statistics.remote.pages_refused + statistics.swap_out_dropped + statistics.swap_out_pending,
        kv_bytes_used=sequence.blocks_used * layout.page_bytes,
        kv_bytes_contiguous=-(-engine.model.context_tokens_max // layout.block_tokens) * layout.page_bytes,
        finish_reason=sequence.finish_reason.value,
        store_error=statistics.remote.last_error,
        tokens=sequence.generated,
        text=text,
    )
