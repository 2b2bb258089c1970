"""Loses power at every operation of the real writer and recovery: `python -m experiments.spill.crash`.

Owns: the workload, the oracle and the count of violations. A node's calls (append, rewrite, reinsert, flush, delete, reclaim,
close) run on a `SimulatedDisk`; after every operation of the device some of the disks that a loss of power may leave are opened
with the real recovery, and read. A history has several lives: each goes on with one of those disks. The oracle knows what
completed calls promised:

    wrong      a read answered OK with other bytes
    lost       a page that was flushed is not found
    returned   a page whose deletion was acknowledged is found
    stale      a record is listed although it cannot be read
    twice      a page is listed twice
    refused    recovery raised

A call in progress may have happened or not. With a lying flush only `wrong` is promised.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.core.hashing import page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import AttnStoreError
from attnstore.spill.disk import Read, Record, SpillDisk, Verdict, Write
from attnstore.spill.errors import DiskFull
from attnstore.spill.format import Entry
from attnstore.spill.segment import Location
from attnstore.spill.segments import FLUSH_S
from attnstore.testing.simulated_disk import SimulatedDisk
from experiments.options import COUNT, SEED
from experiments.spill.mutations import LYING, MUTATIONS

PAGE: Final = PageLayout(1, 1, 75, 4, DType.OPAQUE)
"""600 B: no multiple of a sector, so every page passes through staging."""
SEGMENT_BYTES: Final = 64 << 10
CAPACITY_BYTES: Final = 4 * SEGMENT_BYTES
TENANTS: Final = ("a", "b")
_KEYS: Final = 40
_BATCH_MAX: Final = 4

LIVES: Final = 3
CALLS: Final = 25
"""Of one history: about 400 states."""

Disks = Callable[[dict[str, bytes]], SimulatedDisk]


def page_of(key: int) -> bytes:
    """Returns the only bytes that the page `key` ever has."""
    return hashlib.shake_128(key.to_bytes(8, "little")).digest(PAGE.page_bytes)


def entry_of(key: int) -> Entry:
    """Returns the entry of the page `key`."""
    page_hash = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=32).digest()
    return Entry(bytes(32), page_hash, PAGE.canonical(), page_checksum(page_of(key)), PAGE.page_bytes)


_KEY_OF: Final = {entry_of(key).hash: key for key in range(_KEYS)}


def tenant_of(key: int) -> str:
    """Returns the tenant whose page it is."""
    return TENANTS[key % len(TENANTS)]


@dataclass
class Oracle:
    """What the completed calls promised. `table` is the node's index; `busy` are pages of the call in progress."""

    table: dict[int, Location] = field(default_factory=dict)
    flushed: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)

    def judge(self, disk: SpillDisk, violations: Counter[str]) -> list[Record]:
        """Reads everything that a recovered disk lists and counts violations. Returns what could be read."""
        records = list(disk.recovered())
        pages = [memoryview(bytearray(record.entry.length)) for record in records]
        verdicts = disk.read([Read(record.location, record.entry, page) for record, page in zip(records, pages, strict=True)])
        readable: dict[int, Record] = {}
        for record, page, verdict in zip(records, pages, verdicts, strict=True):
            key = _KEY_OF[record.entry.hash]
            if verdict is not Verdict.OK:
                violations["stale"] += 1
                continue
            violations["wrong"] += page != page_of(key) or record.tenant != tenant_of(key)
            violations["twice"] += key in readable
            readable[key] = record
        violations["lost"] += len(self.flushed - self.busy - readable.keys())
        violations["returned"] += len((self.deleted - self.busy) & readable.keys())
        return list(readable.values())


class History:
    """One seed's calls, in several lives. `states` counts the disks that were opened."""

    def __init__(self, seed: int, disks: Disks = SimulatedDisk, states_at_once: int = 2) -> None:
        self._draw = random.Random(seed)
        self._disks = disks
        self._at_once = states_at_once
        self._oracle = Oracle()
        self._now_s = 0.0
        self._simulated = self._watched({})
        self.violations: Counter[str] = Counter()
        self.states = 0

    def run(self) -> None:
        """Runs `CALLS` calls in each of `LIVES` lives; between lives the node is closed or killed, or the power is lost."""
        for _ in range(LIVES):
            try:
                self._disk = self._opened(self._simulated)
            except AttnStoreError:
                self.violations["refused"] += 1
                return
            self._take_over(self._oracle.judge(self._disk, self.violations))
            for _ in range(CALLS):
                self._draw.choice((self._append, self._append, self._append, self._flush, self._delete, self._reclaim))()
            end = self._draw.choice(("power", "kill", "close"))
            if end == "close":
                self._disk.close()
                self._oracle.flushed |= self._oracle.table.keys()
            if end != "kill":
                self._simulated = self._watched(self._simulated.after_power_loss(self._draw))

    def _take_over(self, readable: Sequence[Record]) -> None:
        """The node's table after a restart: what recovery made durable is promised again."""
        self._oracle.table = {_KEY_OF[record.entry.hash]: record.location for record in readable}
        self._oracle.flushed = set(self._oracle.table)

    def _watched(self, files: dict[str, bytes]) -> SimulatedDisk:
        simulated = self._disks(files)
        simulated.on_operation = self._lose_power
        return simulated

    def _opened(self, simulated: SimulatedDisk) -> SpillDisk:
        return SpillDisk.open(simulated, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, now_s=lambda: self._now_s)

    def _lose_power(self) -> None:
        for _ in range(self._at_once):
            self.states += 1
            try:
                disk = self._opened(self._disks(self._simulated.after_power_loss(self._draw)))
            except AttnStoreError:
                self.violations["refused"] += 1
            else:
                self._oracle.judge(disk, self.violations)

    def _append(self) -> None:
        tenant = self._draw.choice(TENANTS)
        keys = self._draw.sample([key for key in range(_KEYS) if tenant_of(key) == tenant], self._draw.randint(1, _BATCH_MAX))
        self._store(tenant, keys)

    def _store(self, tenant: str, keys: Sequence[int]) -> None:
        """Appends pages, or rewrites those that the disk has."""
        table = self._oracle.table
        self._oracle.busy = set(keys) - self._oracle.flushed
        writes = [Write(entry_of(key), memoryview(page_of(key)), table.get(key)) for key in keys]
        try:
            places = self._disk.append(tenant, writes)
        except DiskFull:
            places = []
        for key, place in zip(keys, places, strict=False):
            table[key] = place
            self._oracle.deleted.discard(key)
        self._oracle.busy = set()

    def _flush(self) -> None:
        self._now_s += FLUSH_S
        self._disk.flush_due()
        self._oracle.flushed |= self._oracle.table.keys()

    def _delete(self) -> None:
        table = self._oracle.table
        keys = self._draw.sample(sorted(table), min(len(table), self._draw.randint(1, _BATCH_MAX)))
        self._oracle.busy = set(keys)
        self._disk.delete([table.pop(key) for key in keys])
        self._oracle.flushed -= set(keys)
        self._oracle.deleted |= set(keys)
        self._oracle.busy = set()

    def _reclaim(self) -> None:
        """Reinserts one page of the oldest segment, as a node does with what was used, and discards the rest."""
        table = self._oracle.table
        used = [key for key in (_KEY_OF[record.entry.hash] for record in self._disk.oldest()) if key in table]
        if used and self._draw.random() < 0.5:
            key = self._draw.choice(used)
            self._store(tenant_of(key), [key])
        oldest = {record.location for record in self._disk.oldest()}
        self._oracle.busy = {key for key, place in table.items() if place in oldest}
        self._disk.reclaim()
        for key in self._oracle.busy:
            del table[key]
        self._oracle.flushed -= self._oracle.busy
        self._oracle.busy = set()


@dataclass(frozen=True, slots=True)
class Result:
    """Disks opened, violations by kind, and the first seed with one."""

    states: int
    violations: dict[str, int]
    first_seed: int | None


def simulate(states: int, first_seed: int = 0, disks: Disks = SimulatedDisk, *, until_violation: bool = False) -> Result:
    """Runs histories of successive seeds until so many disks were opened, or until a violation if asked."""
    done, seed, failing = 0, first_seed, None
    violations: Counter[str] = Counter()
    while done < states and not (until_violation and failing is not None):
        history = History(seed, disks)
        history.run()
        done += history.states
        violations += history.violations
        if failing is None and history.violations.total():
            failing = seed
        seed += 1
    return Result(done, dict(violations), failing)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates the rules as they are, with a lying flush, and with each one left out; prints a table. Returns 1 if there was a
    violation, or if a rule was left out without one.
    """
    parser = CommandParser(prog="python -m experiments.spill.crash", description=__doc__)
    parser.add_argument("--states", type=COUNT, default=12_000, help="disks to open with all rules in place (default 12000)")
    parser.add_argument("--mutant-states", type=COUNT, default=20_000, help="at most so many for each mutation (default 20000)")
    parser.add_argument("--seed", type=SEED, default=0, help="the first seed (default 0)")
    arguments = parser.parse_args(argv)
    whole = simulate(arguments.states, arguments.seed)
    lying = simulate(arguments.states // 4, arguments.seed, LYING)
    table = Table("rule left out", "states", "violations", "first seed")
    table.add_row("none", str(whole.states), _text(whole.violations), str(whole.first_seed))
    table.add_row("none; flushes lie", str(lying.states), _text(lying.violations), str(lying.first_seed))
    is_right = not whole.violations and "wrong" not in lying.violations
    for mutation in MUTATIONS:
        with mutation.applied():
            mutant = simulate(arguments.mutant_states, arguments.seed, mutation.disks, until_violation=True)
        table.add_row(mutation.name, str(mutant.states), _text(mutant.violations), str(mutant.first_seed))
        is_right &= bool(mutant.violations)
    Console(width=132).print(table)
    return 0 if is_right else 1


def _text(violations: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in sorted(violations.items())) or "0"


if __name__ == "__main__":
    raise SystemExit(main())
