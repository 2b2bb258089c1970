"""The replay: right counts on a trace small enough to do by hand, and the published counts on the real trace if it is present."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from attnstore.clock import MonotonicClock
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore_worker.engine import Engine, EngineOptions
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore
from experiments.replay.__main__ import main
from experiments.replay.bound import bound_hits
from experiments.replay.hash_only import UNLIMITED, Capacity, replay
from experiments.replay.trace import BLOCK_TOKENS, Trace, TraceRequest, read_trace
from experiments.replay.with_model import prompt, replay_with_model

ROOT = Path(__file__).parents[2]
REAL_TRACE = ROOT.parent / "shared" / "data" / "traces" / "mooncake_conversation_trace.jsonl"
PROMPTS = [[1, 2, 3], [1, 2, 4], [5, 6, 7], [1, 2, 3]]
SIX_BLOCKS = 6 * BLOCK_TOKENS


def trace_of(prompts: list[list[int]]) -> Trace:
    requests = [
        TraceRequest(float(arrival), tuple(BlockHash(b.to_bytes(32, "big")) for b in prompt))
        for arrival, prompt in enumerate(prompts)
    ]
    return Trace(tuple(requests))


def write_trace(path: Path, prompts: list[list[int]]) -> Path:
    lines = [
        {"timestamp": 1000 * arrival, "input_length": 512 * len(prompt) - 5, "output_length": 7, "hash_ids": prompt}
        for arrival, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def hits(trace: Trace, policy: str, capacity: Capacity, queue_depth: int = 1) -> int:
    return replay(trace, policy, capacity, queue_depth, bound_hit_blocks=0).hit_blocks


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_without_a_limit_every_repeated_prefix_hits(policy: str) -> None:
    found = replay(trace_of(PROMPTS), policy, UNLIMITED, 1, 5)
    assert (found.requests, found.blocks, found.hit_blocks, found.evicted_blocks) == (4, 12, 5, 0)
    assert found.hit_rate_blocks == found.bound_hit_rate_blocks == 5 / 12


def test_only_the_consecutive_prefix_counts() -> None:
    assert hits(trace_of([[1, 2, 3, 4], [1, 9, 3, 4]]), "lru", UNLIMITED) == 1


@pytest.mark.parametrize(("policy", "expected"), [("lru", 4), ("fifo", 4), ("s3-fifo", 4), ("look-ahead", 5)])
def test_knowing_who_waits_saves_the_block_that_history_gives_up(policy: str, expected: int) -> None:
    """A new prompt needs the space of block 3 or 4, and only the queue shows that 3 is used again."""
    assert hits(trace_of(PROMPTS), policy, SIX_BLOCKS) == expected


def test_without_a_queue_look_ahead_is_its_fallback() -> None:
    assert hits(trace_of(PROMPTS), "look-ahead", SIX_BLOCKS, queue_depth=0) == hits(trace_of(PROMPTS), "lru", SIX_BLOCKS)


@pytest.mark.parametrize(("capacity_blocks", "expected"), [(1, 2), (2, 4), (3, 5), (12, 5)])
def test_the_bound_is_the_best_that_hindsight_could_do(capacity_blocks: int, expected: int) -> None:
    assert bound_hits(trace_of(PROMPTS), capacity_blocks) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_policy_passes_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    conversations: list[list[int]] = [[0] for _ in range(8)]
    prompts = []
    for block in range(1, 200):
        conversation = draw.choice(conversations)
        prompts.append([*conversation, block])
        if len(conversation) < 9:
            conversation.append(block)
    trace = trace_of(prompts)
    for capacity_blocks in (10, 20, 40):
        best = bound_hits(trace, capacity_blocks)
        for policy in EVICTION_POLICIES:
            found = replay(trace, policy, capacity_blocks * BLOCK_TOKENS, 16, best)
            assert found.hit_blocks <= best, f"{policy}, seed {seed}"


def test_with_policy_one_object_is_written(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl", PROMPTS), tmp_path / "out.json"
    options = ["--hash-only", "--capacity-tokens", str(SIX_BLOCKS), "--policy", "look-ahead", "--queue-depth", "1"]
    assert main(["--trace", str(trace), *options, "--json", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row.pop("duration_s") >= 0
    assert row == {
        "policy": "look-ahead",
        "capacity_tokens": SIX_BLOCKS,
        "capacity_blocks": 6,
        "queue_depth": 1,
        "requests": 4,
        "blocks": 12,
        "hit_blocks": 5,
        "evicted_blocks": 1,
        "bound_hit_blocks": 5,
        "hit_rate_blocks": 5 / 12,
        "bound_hit_rate_blocks": 5 / 12,
    }


def test_without_policy_the_command_compares_all_of_them(tmp_path: Path) -> None:
    trace, out, plot = write_trace(tmp_path / "trace.jsonl", PROMPTS), tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "-m", "experiments.replay", "--trace", str(trace), "--json", str(out), "--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 requests, 12 prompt blocks" in done.stdout
    assert all(policy in done.stdout for policy in (*EVICTION_POLICIES, "ceiling"))
    assert {row["policy"] for row in json.loads(out.read_text())} == set(EVICTION_POLICIES)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no requests"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\nnonsense\n', ":2 is not a request"),
        ('{"timestamp": 0, "input_length": 5}\n', ":1 is not a request .*hash_ids"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": [-1]}\n', ":1 is not a request"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": ["1"]}\n', ":1 is not a request"),
        ("[1, 2]\n", ":1 is not a request"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": []}\n', ":1 is not a request .*no blocks"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=problem):
        read_trace(path)


def test_wrong_input_ends_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", PROMPTS)
    assert main(["--trace", str(tmp_path / "absent.jsonl")]) == 2
    assert main(["--trace", str(trace), "--capacity-tokens", "1024"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["--trace", str(trace), "--policy", "lru", "--json", str(tmp_path / "absent" / "out.json")])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "cannot be read" in errors[0]
    assert "2 blocks; the longest prompt of the trace needs 3" in errors[1]
    for capacity in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            main(["--trace", str(trace), "--capacity-tokens", capacity])


@pytest.fixture(scope="module")
def conversations() -> Trace:
    """Mooncake's conversation trace: 12,031 requests of one hour."""
    if not REAL_TRACE.exists():
        pytest.skip("Mooncake's conversation trace is not here")
    return read_trace(REAL_TRACE)


@pytest.mark.parametrize(
    ("policy", "capacity", "percent"), [("lru", UNLIMITED, 36.6), ("lru", 3_000_000, 13.6), ("lru", 10_000_000, 28.5)]
)
def test_the_real_trace_gives_the_published_hit_rates(
    conversations: Trace, policy: str, capacity: Capacity, percent: float
) -> None:
    assert conversations.blocks == 288_500
    assert 100 * hits(conversations, policy, capacity) / 288_500 == pytest.approx(percent, abs=0.05)


def test_on_the_real_trace_look_ahead_beats_lru_which_beats_fifo_below_the_ceiling(conversations: Trace) -> None:
    fifo, lru = (hits(conversations, policy, 3_000_000) for policy in ("fifo", "lru"))
    look_ahead = hits(conversations, "look-ahead", 3_000_000, queue_depth=32)
    everything_known = hits(conversations, "look-ahead", 3_000_000, queue_depth=len(conversations.requests))
    ceiling = bound_hits(conversations, 3_000_000 // BLOCK_TOKENS)
    assert fifo < lru < 0.95 * look_ahead
    assert 0.99 * ceiling < everything_known <= ceiling
    assert 100 * ceiling / 288_500 == pytest.approx(35.3, abs=0.05)


def test_prompts_share_tokens_exactly_where_they_share_blocks() -> None:
    first, second, other, again = (prompt(request, 16, 49_152) for request in trace_of(PROMPTS).requests)
    assert len(first) == 3 * 16 + 1
    assert first[:32] == second[:32]
    assert first[32:48] != second[32:48]
    assert first[:48] == again[:48]
    assert not set(zip(range(48), first[:48], strict=True)) & set(zip(range(48), other[:48], strict=True))


def test_a_slice_finds_in_the_engine_what_the_trace_repeats(tiny: LoadedModel) -> None:
    """The second prompt shares two blocks with the first, the fourth has all three: 5 of 12 blocks; each has one more token."""
    page_bytes = tiny.layout(16).page_bytes
    with Engine(tiny, EngineOptions(pool_bytes=64 * page_bytes)) as engine:
        result = replay_with_model(engine, trace_of(PROMPTS), 4, 300.0, MonotonicClock())
        engine.check()
    assert result.requests == 4
    assert result.prompt_tokens == 4 * 49
    assert result.generated_tokens == 4
    assert result.hit_rate["hbm"] == pytest.approx(5 * 16 / (4 * 49))
    assert 0 < result.ttft_ms_p50 <= result.ttft_ms_p90 <= result.ttft_ms_p99


def test_what_the_pool_cannot_keep_comes_back_from_host_and_store(tiny: LoadedModel, store: MemoryStore) -> None:
    """Pool and HOST hold four blocks each; five prompts of three blocks run, and then the first again."""
    page_bytes = tiny.layout(16).page_bytes
    options = EngineOptions(pool_bytes=4 * page_bytes, host_pool_bytes=4 * page_bytes)
    trace = trace_of([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [1, 2, 3]])
    with Engine(tiny, options, store=store) as engine:
        result = replay_with_model(engine, trace, 5, 300.0, MonotonicClock())
        engine.check()
    found = sum(rate for tier, rate in result.hit_rate.items() if tier != "hbm")
    assert found == pytest.approx(3 * 16 / (5 * 49))
    assert result.bytes_up["remote"] + result.bytes_up["host"] == 3 * page_bytes
    assert result.bytes_written >= 12 * page_bytes


def test_the_command_runs_a_slice_behind_a_store_node(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, figures = write_trace(tmp_path / "trace.jsonl", PROMPTS), tmp_path / "figures.json"
    how = ["--with-model", "3", "--slowdown", "0.01", "--model", str(tiny_folder), "--dtype", "fp32", "--node-capacity", "64MiB"]
    assert main(["--trace", str(trace), *how, "--json", str(figures)]) == 0
    assert "3 requests with 147 prompt tokens" in capsys.readouterr().out
    assert json.loads(figures.read_text())["bytes_written"] > 0


def test_a_slowdown_that_is_not_positive_is_refused(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", PROMPTS)
    how = ["--with-model", "3", "--slowdown", "0", "--model", str(tiny_folder), "--node-capacity", "0"]
    with pytest.raises(SystemExit, match="2"):
        main(["--trace", str(trace), *how])
    assert "--slowdown: '0' is not a number above 0" in capsys.readouterr().err
