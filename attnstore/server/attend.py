"""Attend on a store node: the sets of pages that a stream has open, and the computation over them.

Owns: `Attending`, one per node that can attend, and `AttendSession`, one per stream; transports call them.
Invariants: the pages of an open set are pinned, so a result is computed from exactly those pages; a set is used only while its
lease is alive, and closed soon after the lease expires (`expire`), so a stream pins pages no longer than its client renews the
lease; one computation uses the node's cores at a time, in the order of `FairTurns`.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from attnstore.clock import Clock, Deadline
from attnstore.core.fair_share import FairShares
from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument, LeaseExpired
from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_CALLS_MAX,
    ATTEND_HASHES_MAX,
    ATTEND_PAGES_MAX,
    ATTEND_ROWS_MAX,
    ATTEND_SETS_MAX,
    ATTEND_TOGETHER_MAX,
    ATTEND_VERIFIED_MS_MAX,
    ATTEND_WAITING_MAX,
)
from attnstore.server.store import Store
from attnstore.server.turns import FairTurns
from attnstore.types import AttendLimits, PageStatus, Space
from attnstore.wire.attend import FLOAT_BYTES, AttendClose, AttendOpen, AttendQuery, AttendShape

if TYPE_CHECKING:
    from attnstore.attention.in_place import PagesInPlace, PreparedQuery

LIMITS: Final = AttendLimits(ATTEND_ROWS_MAX, ATTEND_BYTES_MAX, ATTEND_HASHES_MAX, ATTEND_SETS_MAX, latents=True, windows=True)
_BUDGET_MS_DEFAULT: Final = 10_000
_ROWS_PER_READ: Final = 8
_QUESTIONS_MAX: Final = 16
"""Prepared queries that a stream keeps, of ATTEND_ROWS_MAX rows together: the pieces of a prefill chunk, or steps with and without
drafts, alternate.
"""
_NEEDED: Final = ("torch", "numba")


Partial = tuple[memoryview, memoryview]
"""The bytes of `out` fp32 `[rows, q_heads, head_dim]` and of `lse` fp32 `[rows, q_heads]`, valid until the stream's next query."""


class _Question(NamedTuple):
    """A query as far as it is the same at each layer."""

    query: PreparedQuery
    rows: int
    shape: tuple[PageLayout, AttendShape]
    leases: tuple[bytes, ...]
    cost: int


class _Job(NamedTuple):
    question: _Question
    layer: int


@dataclass(frozen=True, slots=True)
class _Set:
    """`pins` keep the pages' memory mapped and their content in place."""

    pages: PagesInPlace
    lease_id: bytes
    pins: ExitStack


class Attending:
    """Attends over the pages of `store` with `threads` cores, for `tenants` tenants.

    The constructor imports torch, and `warm_up` compiles. Both take seconds and hold the interpreter lock for up to a second at a
    time, so call them before the node serves.
    """

    def __init__(self, store: Store, clock: Clock, threads: int, tenants: int = 1) -> None:
        self.store = store
        self.clock = clock
        from attnstore.attention.in_place import InPlaceAttention

        self._attention = InPlaceAttention(threads)
        self._turns = FairTurns[_Job, Partial](
            self._compute, _kind, clock, waiting_max=ATTEND_WAITING_MAX, together_max=ATTEND_TOGETHER_MAX, tenants=tenants
        )
        self._pages = FairShares(ATTEND_PAGES_MAX, "pages of attended sets", "close some sets, or fetch the pages", tenants=tenants)
        # Its threads block while they wait for turns, which would exhaust the event loop's own executor.
        self.executor = ThreadPoolExecutor(ATTEND_CALLS_MAX, "attnstore-attend")
        self._lock = threading.Lock()
        self._sessions: set[AttendSession] = set()

    @staticmethod
    def is_possible() -> bool:
        """Returns whether the packages of the extra `attention` are installed."""
        return all(importlib.util.find_spec(name) is not None for name in _NEEDED)

    def warm_up(self) -> None:
        """Compiles the kernels, so that no query waits for it. Takes a minute the first time on a machine, seconds afterwards."""
        self._attention.warm_up()

    @property
    def waiting(self) -> int:
        """The number of queries that wait for the cores."""
        return self._turns.waiting

    def session(self, tenant: str) -> AttendSession:
        """Returns a session without open sets for a new stream. The caller closes it."""
        session = AttendSession(self, tenant)
        with self._lock:
            self._sessions.add(session)
        return session

    def forget(self, session: AttendSession) -> None:
        """Removes a closed session."""
        with self._lock:
            self._sessions.discard(session)

    def expire(self) -> None:
        """Closes the sets whose lease has expired, except those used by a running step."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.expire()

    @contextmanager
    def counted(self, tenant: str, pages: int) -> Iterator[None]:
        """Counts `pages` as part of an open set for the duration of the block. Raises `Overloaded` beyond the tenant's share."""
        with self._lock:
            self._pages.take(tenant, pages)
        try:
            yield
        finally:
            with self._lock:
                self._pages.give_back(tenant, pages)

    def prepare(
        self, layout: PageLayout, shape: AttendShape, sets: Sequence[_Set], counts: Sequence[int], firsts: memoryview
    ) -> _Question:
        """Prepares queries of `counts[i]` rows against `sets[i]`; `firsts` as in `InPlaceAttention.prepare`."""
        from attnstore.attention.in_place import Asked

        asked = Asked(shape.q_heads, shape.scale, shape.value_dim)
        query = self._attention.prepare([part.pages for part in sets], counts, asked, firsts)
        # With few rows reading the pages dominates the cost, with many rows multiplication does.
        pages = sum(seen * (1 + rows // _ROWS_PER_READ) for seen, rows in zip(query.seen_pages, counts, strict=True))
        leases = tuple({part.lease_id for part in sets})
        return _Question(query, sum(counts), (layout, shape), leases, pages * layout.layer_bytes)

    def compute(self, question: _Question, layer: int, tenant: str, deadline: Deadline) -> Partial:
        """Returns the partial of a question's loaded rows, computed when its turn comes. Errors as in `FairTurns.take`."""
        return self._turns.take(_Job(question, layer), tenant=tenant, cost=question.cost, deadline=deadline)

    def _compute(self, jobs: Sequence[_Job]) -> list[Partial]:
        queries = [job.question.query for job in jobs]
        self._attention.attend(queries, jobs[0].layer)
        return [(query.out, query.lse) for query in queries]


class AttendSession:
    """The sets of one stream of `tenant`. One step at a time; `expire` may be called from any thread."""

    def __init__(self, attending: Attending, tenant: str) -> None:
        self._attending = attending
        self._tenant = tenant
        self._shape: AttendShape | None = None
        self._layout: PageLayout | None = None
        self._space = Space(tenant, b"")
        self._sets: dict[int, _Set] = {}
        self._questions: dict[tuple[Sequence[tuple[int, int]], bytes], _Question] = {}  # about the sets that are open now
        self._busy = threading.Lock()

    @property
    def sets(self) -> int:
        """The number of open sets. Safe from any thread."""
        return len(self._sets)

    def open(self, opening: AttendOpen) -> None:
        """Pins the pages of a set. Blocks for microseconds per page, plus the time to hash pages that were not hashed lately: the
        answer to a query has no checksum that would reveal a page that changed in memory.

        Raises `LeaseExpired` if the lease is not alive or a page is missing. Raises `InvalidArgument` for a set that is already
        open, names a page twice or does not fit the stream's other sets. Raises `Overloaded` beyond the tenant's share of pages in
        sets, and what `Store.layout_of` raises.
        """
        from attnstore.attention.in_place import PagesInPlace

        with self._busy:
            space = Space(self._tenant, opening.shape.namespace)
            layout = self._attending.store.layout_of(space)
            self._check_opening(opening, layout)
            with ExitStack() as pins:
                pins.enter_context(self._attending.counted(self._tenant, len(opening.hashes)))
                views = []
                self._attending.store.leases.counts_held(len(opening.hashes))
                found = pins.enter_context(self._attending.store.reading_all(space, opening.hashes, opening.lease_id))
                for index, page in enumerate(found):
                    if isinstance(page, PageStatus):
                        raise LeaseExpired(f"page {index} of the set's {len(found)} is {page.name}: match again")
                    if not self._attending.store.is_intact(page, ATTEND_VERIFIED_MS_MAX):
                        raise LeaseExpired(f"page {index} of the set's {len(found)} was corrupt and has been removed: match again")
                    views.append(page.data)
                self._sets[opening.set_id] = _Set(PagesInPlace(layout, views), opening.lease_id, pins.pop_all())
            self._shape, self._layout, self._space = opening.shape, layout, space

    def answer(self, query: AttendQuery) -> Partial:
        """Returns the partial of the query's rows. Blocks until it is computed.

        Raises `InvalidArgument` for a malformed query, `LeaseExpired` for a set whose lease has expired, `Overloaded` and
        `DeadlineExceeded` as `FairTurns.take` does.
        """
        with self._busy:
            key = query.sets, bytes(query.firsts)
            question = self._questions.get(key)
            if question is not None and not self._attending.store.leases.holds(self._space, question.leases):
                question = None
            sets = [] if question is not None else [self._alive(set_id) for set_id, _ in query.sets]
            layout, shape = self._checked(query)
            if question is None:
                self._make_room(query.total_rows)
                counts = [rows for _, rows in query.sets]
                question = self._questions[key] = self._attending.prepare(layout, shape, sets, counts, query.firsts)
            question.query.load(query.vectors)
            deadline = Deadline(self._attending.clock, query.budget_ms or _BUDGET_MS_DEFAULT)
            return self._attending.compute(question, query.layer, self._tenant, deadline)

    def _checked(self, query: AttendQuery) -> tuple[PageLayout, AttendShape]:
        """Returns what the query is about. Raises `InvalidArgument` before memory is taken for rows that did not come."""
        layout, shape = self._layout, self._shape
        assert layout is not None
        assert shape is not None
        if query.layer >= layout.layers:
            raise InvalidArgument(f"layer is {query.layer}; the layout has layers 0 to {layout.layers - 1}")
        due = query.total_rows * shape.q_heads * layout.query_dim(shape.value_dim) * FLOAT_BYTES
        if query.vectors.nbytes != due:
            raise InvalidArgument(f"{query.total_rows} rows have {due} bytes, not {query.vectors.nbytes}")
        return layout, shape

    def _make_room(self, rows: int) -> None:
        """Drops the kept questions unless another one of `rows` rows may be kept beside them."""
        kept = [question.rows for question in self._questions.values()]
        if len(kept) >= _QUESTIONS_MAX or sum(kept) + rows > ATTEND_ROWS_MAX:
            self._questions.clear()

    def close_set(self, closing: AttendClose) -> None:
        """Closes a set, if it is open."""
        with self._busy:
            self._drop(closing.set_id)

    def expire(self) -> None:
        """Closes the sets whose lease has expired, unless a step is running."""
        if self._busy.acquire(blocking=False):
            try:
                for set_id in [set_id for set_id, part in self._sets.items() if not self._holds(part)]:
                    self._drop(set_id)
            finally:
                self._busy.release()

    def close(self) -> None:
        """Closes all sets. Closing twice is harmless."""
        with self._busy:
            for set_id in list(self._sets):
                self._drop(set_id)
        self._attending.forget(self)

    def _check_opening(self, opening: AttendOpen, layout: PageLayout) -> None:
        if opening.set_id in self._sets:
            raise InvalidArgument(f"set {opening.set_id} is open already; close it first")
        if len(self._sets) >= ATTEND_SETS_MAX:
            raise InvalidArgument(f"{ATTEND_SETS_MAX} sets are open on this stream; close some or open another stream")
        if len(set(opening.hashes)) < len(opening.hashes):
            raise InvalidArgument("a set names a page twice; a sequence has each of its pages once")
        if self._shape is not None and opening.shape != self._shape:
            raise InvalidArgument("all sets of a stream have one namespace, one q_heads and one scale; open another stream")
        if opening.shape.value_dim:
            layout.check_latents(opening.shape.value_dim)
        if opening.shape.q_heads % layout.kv_heads:
            raise InvalidArgument(
                f"q_heads is {opening.shape.q_heads}, which is not a multiple of the layout's {layout.kv_heads} kv_heads"
            )

    def _alive(self, set_id: int) -> _Set:
        part = self._sets.get(set_id)
        if part is None:
            raise LeaseExpired(f"set {set_id} is not open: it never was, or its lease expired; match again")
        if not self._holds(part):
            self._drop(set_id)
            raise LeaseExpired(f"the lease of set {set_id} has expired; match again")
        return part

    def _holds(self, part: _Set) -> bool:
        return self._attending.store.leases.holds(self._space, (part.lease_id,))

    def _drop(self, set_id: int) -> None:
        part = self._sets.pop(set_id, None)
        if part is not None:
            self._questions.clear()  # before the pages are let go
            part.pins.close()


def _kind(job: _Job) -> tuple[object, ...]:
    return job.question.shape, job.layer


def threads_default() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))
