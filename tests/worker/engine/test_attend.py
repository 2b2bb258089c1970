"""The engine with blocks that stay in the store: whatever the nodes do, the tokens are those of a resident run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakSet

import pytest

import attnstore
from attnstore import errors
from attnstore.client.base import AttendStream
from attnstore.client.cluster.attend import AttendedPrefix, StoreAttention
from attnstore.client.transports.connection import NodeConnection
from attnstore.testing import StoreProcess
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, FinishReason, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.errors import SequenceFailed
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore
from tests.samples import deleted_after_reading, eventually

BLOCKS = 8
"""The pool of these tests: an eighth of the tiny model's context of 512 tokens in each two blocks of 16."""
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[StoreProcess]]:
    options = ("--capacity", "64MiB", "--attend-threads", "1")
    with StoreProcess(*options) as first, StoreProcess(*options) as second:
        yield [first, second]


@pytest.fixture
def client(nodes: list[StoreProcess]) -> Iterator[attnstore.Client]:
    with attnstore.connect(nodes[0].url, transport="tcp", deadline_ms=60_000) as client:
        yield client


def options(model: LoadedModel, request: str, attend: AttendPolicy = AttendPolicy.BEYOND_POOL, **more: object) -> EngineOptions:
    """Every test has pages of its own in the shared nodes."""
    pool_bytes = BLOCKS * model.layout(16).page_bytes
    # A node compiles its kernels at the first query. That takes long on a busy machine.
    named = {"store_deadline_ms": 60_000, "tenant_salt": request.encode(), **more}
    return EngineOptions(pool_bytes=pool_bytes, chunk_tokens=32, attend=attend, **named)  # type: ignore[arg-type]


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [(7 * index * index + 13 * index + seed) % 4096 + 10 for index in range(tokens)]


def resident(model: LoadedModel, token_ids: list[int], sampling: SamplingParams | None = None) -> list[int]:
    """The tokens of a run whose pool holds everything."""
    pool = EngineOptions(pool_bytes=64 * model.layout(16).page_bytes, chunk_tokens=32)
    with Engine(model, pool) as engine:
        return engine.generate(token_ids, sampling or SamplingParams(max_tokens=NEW_TOKENS)).generated


def run(engine: Engine, token_ids: list[int]) -> Prompted:
    sequence = engine.generate(token_ids, SamplingParams(max_tokens=NEW_TOKENS))
    engine.check()
    engine.flush(60_000)
    assert engine.statistics().pool.held == 0
    return sequence


class Flaky:
    """A store whose attend streams do what the test says: `fault` is called before each answer and may raise."""

    def __init__(self, client: attnstore.Client) -> None:
        self._client = client
        self.fault: Callable[[], None] = lambda: None
        self.answers = 0

    def register_layout(self, namespace: bytes, layout: attnstore.PageLayout, /) -> object:
        return self._client.register_layout(namespace, layout)

    def attention(self, namespace: bytes, /, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> StoreAttention:
        attention = self._client.attention(namespace, q_heads=q_heads, scale=scale, deadline_ms=deadline_ms)
        open_prefix = attention.open

        def open_faulty(hashes: Sequence[bytes]) -> AttendedPrefix | None:
            prefix = open_prefix(hashes)
            for each in prefix.sets if prefix is not None else ():
                if each.stream not in faulty:
                    faulty.add(each.stream)
                    each.stream.receive = self._faulty(each.stream.receive)  # type: ignore[method-assign]
            return prefix

        faulty: WeakSet[AttendStream] = WeakSet()
        attention.open = open_faulty  # type: ignore[method-assign]
        return attention

    def _faulty(self, receive: Callable[[memoryview, memoryview], None]) -> Callable[[memoryview, memoryview], None]:
        def faulty(out: memoryview, lse: memoryview) -> None:
            self.answers += 1
            self.fault()
            receive(out, lse)

        return faulty


@pytest.mark.usefixtures("each_device")
def test_a_context_four_times_the_pool_runs_to_its_end_with_the_resident_tokens(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    token_ids = prompt(4 * BLOCKS * 16 - NEW_TOKENS - 8)
    with Engine(tiny, options(tiny, request.node.name), store=client, attend_store=client) as engine:
        held = []
        sequence = engine.submit(token_ids, SamplingParams(max_tokens=NEW_TOKENS))
        while sequence.finish_reason is None:
            engine.step()
            held.append(engine.statistics().pool.held)
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == resident(tiny, token_ids)
        assert max(held) <= BLOCKS
        assert engine.statistics().pool.capacity == BLOCKS
        attending = engine.attending()
        assert attending is not None
        assert attending.round_trips > 0
        assert attending.losses == 0
        assert attending.pages_open == 0


def test_where_nothing_repeats_the_model_guesses_by_the_blocks_that_are_here_and_the_tokens_stay_the_same(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    node = Flaky(client)
    node.fault = lambda: time.sleep(0.02)  # a distant node: drafts pay
    token_ids = prompt(20 * 16 + 3)
    with Engine(tiny, options(tiny, request.node.name, speculate=True), store=client, attend_store=node) as engine:
        for sampling in (SamplingParams(max_tokens=NEW_TOKENS), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.7, seed=3)):
            sequence = engine.generate(token_ids, sampling)
            engine.check()
            assert sequence.generated == resident(tiny, token_ids, sampling)
        assert engine.batching().drafts_checked > 0


def test_a_node_that_fails_in_a_way_nobody_foresaw_costs_one_sequence_and_no_lease(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NodeConnection, "attend", lambda *_: 1 // 0)
    long, short = prompt(3 * BLOCKS * 16), prompt(20, seed=1)
    with Engine(tiny, options(tiny, request.node.name), store=client) as engine:
        before = client.stats().leases
        sequences = [engine.submit(each, SamplingParams(max_tokens=NEW_TOKENS)) for each in (long, short)]
        while not engine.idle:
            engine.step()
            engine.check()
        assert isinstance(sequences[0].error, SequenceFailed)
        assert sequences[1].generated == resident(tiny, short)
        assert engine.flush(60_000)
        assert engine.statistics().pool.held == 0
        assert eventually(lambda: client.stats().leases == before)


def test_without_attend_such_a_context_is_refused(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    with (
        Engine(tiny, options(tiny, request.node.name, AttendPolicy.NEVER), store=client, attend_store=client) as engine,
        pytest.raises(errors.InvalidArgument, match="pool"),
    ):
        engine.submit(prompt(300))


def test_a_sequence_that_outgrows_the_pool_while_it_generates_goes_on(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    token_ids = prompt(BLOCKS * 16 - 4)
    with Engine(tiny, options(tiny, request.node.name), store=client, attend_store=client) as engine:
        sequence = run(engine, token_ids)
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == resident(tiny, token_ids)


def test_a_warm_prefix_is_attended_to_and_not_fetched(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    token_ids = prompt(6 * 16 + 5)
    wanted = options(tiny, request.node.name, AttendPolicy.ALWAYS)
    with Engine(tiny, wanted, store=client, attend_store=client) as cold:
        expected = run(cold, token_ids).generated
        assert cold.flush(30_000)
    assert expected == resident(tiny, token_ids)
    with Engine(tiny, wanted, store=client, attend_store=client) as warm:
        sequence = run(warm, token_ids)
        assert sequence.generated == expected
        assert sequence.admission is not None
        assert sequence.admission.remote_tokens == 6 * 16
        assert warm.statistics().remote.pages_read == 0
        attending = warm.attending()
        assert attending is not None
        assert attending.round_trips == NEW_TOKENS * tiny.layout(16).layers, "one for each layer of each step"


def test_bytes_of_a_token_do_not_depend_on_the_length_of_its_context(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    wanted = options(tiny, request.node.name, AttendPolicy.ALWAYS)
    sent = []
    for blocks in (2, 6):
        token_ids = prompt(blocks * 16 + 1)
        for _ in range(2):
            with Engine(tiny, wanted, store=client, attend_store=client) as engine:
                run(engine, token_ids)
                assert engine.flush(30_000)
                attending = engine.attending()
                assert attending is not None
        sent.append((attending.bytes_sent, attending.bytes_received))
    assert sent[0] == sent[1]


def test_several_sequences_attend_in_one_exchange_a_layer(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    prompts = [prompt(2 * 16 + 1, seed) for seed in range(3)]
    wanted = options(tiny, request.node.name, AttendPolicy.ALWAYS)
    with Engine(tiny, wanted, store=client, attend_store=client) as engine:
        for token_ids in prompts:
            engine.generate(token_ids, SamplingParams(max_tokens=1))
        assert engine.flush(30_000)
    with Engine(tiny, wanted, store=client, attend_store=client) as engine:
        sequences = engine.generate_all(prompts, SamplingParams(max_tokens=8))
        attending = engine.attending()
        assert attending is not None
        assert [sequence.generated for sequence in sequences] == [
            resident(tiny, token_ids, SamplingParams(max_tokens=8)) for token_ids in prompts
        ]
        assert attending.round_trips == 8 * tiny.layout(16).layers
        assert attending.rows == 3 * attending.round_trips


def test_two_nodes_that_hold_parts_of_a_context_answer_together(
    tiny: LoadedModel, nodes: list[StoreProcess], client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    token_ids = prompt(6 * 16 + 1)
    wanted = options(tiny, request.node.name, AttendPolicy.ALWAYS)
    with (
        attnstore.connect(nodes[1].url, transport="tcp", deadline_ms=60_000) as other,
        Engine(tiny, wanted, store=client) as writer,
    ):
        run(writer, token_ids)
        assert writer.flush(30_000)
        name = attnstore.namespace(writer.layout, model=tiny.fingerprint, tenant_salt=wanted.tenant_salt)
        hashes = attnstore.block_hashes(name, token_ids, 16)
        moved = hashes[2:5]
        buffers = [bytearray(writer.layout.page_bytes) for _ in moved]
        client.read(name, moved, buffers)
        other.register_layout(name, writer.layout)
        other.write(name, moved, buffers)
        assert set(deleted_after_reading(client, name, moved)) == {attnstore.PageStatus.OK}
        addresses = ",".join(node.address for node in nodes)
        with (
            attnstore.connect(f"grpc://{addresses}?replicas=2", transport="tcp", deadline_ms=60_000) as both,
            Engine(tiny, wanted, store=client, attend_store=both) as engine,
        ):
            sequence = run(engine, token_ids)
            assert sequence.admission is not None
            assert sequence.admission.remote_tokens == 6 * 16
            assert sequence.generated == resident(tiny, token_ids)
            attending = engine.attending()
            assert attending is not None
            assert attending.rows == 2 * attending.round_trips, "both nodes are asked at once"


FAULTS = {
    "a node is lost": errors.Unavailable("the peer closed the page channel"),
    "a lease is lost": errors.LeaseExpired("the lease of set 0 has run out; match again"),
    "a node is slow": errors.DeadlineExceeded("the peer moved no byte"),
    "a node is overloaded": errors.Overloaded("256 queries wait for this node's cores"),
    "a query is refused": errors.InvalidArgument("a query row has an element that is not finite"),
    "a node breaks the protocol": errors.ProtocolError("a SLICE frame came"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("length", [6 * 16 + 5, 20 * 16])
def test_one_fault_mid_stream_costs_time_and_no_token(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest, fault: str, length: int
) -> None:
    node = Flaky(client)

    def once() -> None:
        if node.answers == 9:
            raise FAULTS[fault]

    node.fault = once
    token_ids = prompt(length)
    with Engine(tiny, options(tiny, request.node.name, AttendPolicy.ALWAYS), store=client, attend_store=node) as engine:
        sequence = run(engine, token_ids)
        assert node.answers > 9
        attending = engine.attending()
        assert attending is not None
        assert attending.losses >= 1
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == resident(tiny, token_ids)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_fetching_or_computing_where_the_context_fits(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest, fault: str
) -> None:
    node = Flaky(client)

    def always() -> None:
        if node.answers > 5:
            raise FAULTS[fault]

    node.fault = always
    token_ids = prompt(5 * 16)
    with Engine(tiny, options(tiny, request.node.name, AttendPolicy.ALWAYS), store=client, attend_store=node) as engine:
        sequence = run(engine, token_ids)
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == resident(tiny, token_ids)


def test_a_fault_that_stays_ends_a_context_that_does_not_fit_with_a_reason(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    node = Flaky(client)

    def always() -> None:
        if node.answers > 5:
            raise errors.Unavailable("gone")

    node.fault = always
    with Engine(tiny, options(tiny, request.node.name), store=client, attend_store=node) as engine:
        sequence = run(engine, prompt(20 * 16))
        assert sequence.finish_reason is FinishReason.REMOTE_LOST
        assert engine.idle
        assert run(engine, prompt(3 * 16, 5)).generated == resident(tiny, prompt(3 * 16, 5)), "others go on"


def test_a_store_that_keeps_nothing_ends_a_context_that_does_not_fit_with_a_reason(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest, store: MemoryStore
) -> None:
    store.failing = ("write",)
    with Engine(tiny, options(tiny, request.node.name, store_deadline_ms=200), store=store, attend_store=client) as engine:
        assert run(engine, prompt(20 * 16)).finish_reason is FinishReason.REMOTE_LOST


def test_a_killed_node_mid_generation_costs_no_token(tiny: LoadedModel, request: pytest.FixtureRequest) -> None:
    token_ids = prompt(6 * 16 + 5)
    with (
        StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node,
        attnstore.connect(node.url, transport="tcp", deadline_ms=60_000) as client,
        Engine(tiny, options(tiny, request.node.name, AttendPolicy.ALWAYS), store=client, attend_store=client) as engine,
    ):
        engine.generate(token_ids, SamplingParams(max_tokens=1))
        assert engine.flush(30_000)
        sequence = engine.submit(token_ids, SamplingParams(max_tokens=NEW_TOKENS))
        while len(sequence.generated) < 5 and sequence.finish_reason is None:
            engine.step()
        assert sequence.attend.prefix is not None
        node.kill()
        while sequence.finish_reason is None:
            engine.step()
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == resident(tiny, token_ids)


def test_cancelling_lets_the_pages_at_the_node_go(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    with Engine(tiny, options(tiny, request.node.name), store=client, attend_store=client) as engine:
        sequence = engine.submit(prompt(20 * 16), SamplingParams(max_tokens=NEW_TOKENS))
        while sequence.attend.prefix is None:
            engine.step()
        engine.cancel(sequence)
        attending = engine.attending()
        assert attending is not None
        assert attending.pages_open == 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="beyond_pool"):
        EngineOptions(attend="sometimes")  # type: ignore[arg-type]


def test_attending_needs_a_node_that_answers(tiny: LoadedModel, store: MemoryStore) -> None:
    with pytest.raises(errors.InvalidArgument, match="answers queries"):
        Engine(tiny, EngineOptions(attend=AttendPolicy.ALWAYS), store=store)


def test_a_stream_that_breaks_between_two_steps_costs_no_token(
    tiny: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest
) -> None:
    prompts = [prompt(3 * 16 + 1, seed) for seed in range(2)]
    wanted = options(tiny, request.node.name, AttendPolicy.ALWAYS)
    with Engine(tiny, wanted, store=client) as engine:
        for token_ids in prompts:
            engine.generate(token_ids, SamplingParams(max_tokens=1))
        assert engine.flush(30_000)
        sequences = [engine.submit(token_ids, SamplingParams(max_tokens=NEW_TOKENS)) for token_ids in prompts]
        while len(sequences[0].generated) < 3:
            engine.step()
        assert sequences[0].attend.prefix is not None
        assert sequences[1].attend.prefix is not None
        sequences[0].attend.prefix.sets[0].stream.close()
        engine.cancel(sequences[0])
        while sequences[1].finish_reason is None:
            engine.step()
        assert sequences[1].generated == resident(tiny, prompts[1])
