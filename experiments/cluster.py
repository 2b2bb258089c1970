"""`python -m experiments.cluster`: do three nodes deliver three times the bandwidth of one, and what does the directory cost?

Owns: the measurement over network namespaces (root, `ip` and `tc` needed). Every node has its own host and a link of a given rate;
the directory and all client processes are on hosts with unshaped links. Clients read pages of randomly chosen segments as fast as
they can; the figure is the payload of all clients divided by the time from the first request to the last answer. Only a few
segments fit into memory here, so they are chosen such that every node owns as many; with the many segments of a real store the
shares are equal within 5% (tests/core/test_placement.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import attnstore
from attnstore.command_line import CommandParser
from attnstore.core.hashing import segment_key
from attnstore.core.placement import Placement
from attnstore.limits import SEGMENT_BLOCKS
from attnstore.option_types import file_to_write
from attnstore.testing import RedisServer, StoreProcess
from attnstore.testing.netns import Host, Switch
from experiments.bandwidth.processes import Child
from experiments.bandwidth.report import aligned
from experiments.options import COUNT, POSITIVE

_LAYOUT = attnstore.PageLayout(layers=30, kv_heads=3, head_dim=64)
_NAMESPACE = attnstore.namespace(_LAYOUT, model=b"experiments.cluster")
_SEGMENTS = 24
_THREADS = 8
_PAGES = 16
"""Pages per read. Many reads of few pages keep all links busy; with few long reads a link is idle at times."""
_CAPACITY = "1GiB"
_SCALING_MIN = 2.7
_DEADLINE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """One cluster: `gb_per_s` is 10^9 bytes of payload per second, `share` that divided by the rate of all nodes' links."""

    nodes: int
    clients: int
    gbit_per_s: float
    gb_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class DirectoryCost:
    """The load of the directory by heartbeats and look-ups alone, per second, for each node and each client.

    `bytes_per_node` is the memory of the directory's keys divided by the nodes.
    """

    nodes: int
    clients: int
    operations_per_s_node: float
    operations_per_s_client: float
    network_bytes_per_s: float
    bytes_per_node: float


class Cluster:
    """A switch with a directory, nodes and a host for clients; a context manager."""

    def __init__(self, nodes: int, gbit_per_s: float) -> None:
        self._stack = ExitStack()
        try:
            switch = self._stack.enter_context(Switch())
            home = switch.join("directory")
            with home.entered():
                self.directory = self._stack.enter_context(RedisServer("protected-mode no", host="0.0.0.0"))
            self._home = home
            self.url = f"redis://{home.address}:{self.directory.port}/0"
            for number in range(nodes):
                self._start_node(switch.join(f"node{number}"), switch, gbit_per_s)
            self._clients = switch.join("clients")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_outcome: object) -> None:
        self._stack.close()

    def _start_node(self, host: Host, switch: Switch, gbit_per_s: float) -> None:
        switch.shape(host, f"{gbit_per_s:f}g")
        member = ("--directory", self.url, "--insecure", "--capacity", _CAPACITY, "--log-level", "error")
        with host.entered():
            self._stack.enter_context(StoreProcess("--listen", f"{host.address}:0", *member))

    def clients(self, count: int, nodes: int, writers: int) -> list[Child]:
        """Starts client processes, each of which knows all nodes; the first `writers` of them have stored the pages."""
        with self._clients.entered():
            started = []
            for number in range(count):
                start = json.dumps({"url": self.url, "nodes": nodes, "seed": number, "writes": number < writers})
                child = self._stack.enter_context(Child([sys.executable, "-m", "experiments.cluster", "--client", start]))
                child.first_line()
                started.append(child)
        return started

    def asked(self) -> tuple[int, int, int]:
        """Returns the directory's commands, bytes moved and bytes stored so far."""
        with self._home.entered():
            client = self.directory.client()
            commands = client.info("commandstats")["cmdstat_eval"]["calls"]
            stats = client.info("stats")
            kept = sum(client.memory_usage(key) or 0 for key in client.keys("*"))
            client.close()
        return commands, stats["total_net_input_bytes"] + stats["total_net_output_bytes"], kept


def measure_bandwidth(nodes: int, clients: int, gbit_per_s: float, seconds: float) -> Bandwidth:
    """Measures reads from a cluster of that many nodes with that many client processes."""
    with Cluster(nodes, gbit_per_s) as cluster:
        children = cluster.clients(clients, nodes, writers=1)
        began = time.perf_counter()
        for child in children:
            child.tell(json.dumps({"seconds": seconds}))
        moved_bytes = sum(json.loads(child.answer())["bytes"] for child in children)
        gb_per_s = moved_bytes / (time.perf_counter() - began) / 1e9
    return Bandwidth(nodes, clients, gbit_per_s, gb_per_s, gb_per_s * 8 / (gbit_per_s * nodes))


def measure_directory(nodes: int, clients: int, seconds: float) -> DirectoryCost:
    """Counts the requests to the directory, without and with clients."""
    with Cluster(nodes, 10.0) as cluster:
        by_nodes, _, _ = _over(cluster, seconds)
        cluster.clients(clients, nodes, writers=0)
        by_all, moved, kept = _over(cluster, seconds)
    return DirectoryCost(
        nodes=nodes,
        clients=clients,
        operations_per_s_node=by_nodes / nodes,
        operations_per_s_client=(by_all - by_nodes) / clients,
        network_bytes_per_s=moved,
        bytes_per_node=kept / nodes,
    )


def _over(cluster: Cluster, seconds: float) -> tuple[float, float, int]:
    commands, moved, _ = cluster.asked()
    time.sleep(seconds)
    later, moved_later, kept = cluster.asked()
    return (later - commands) / seconds, (moved_later - moved) / seconds, kept


def balanced(nodes: list[str]) -> list[list[attnstore.BlockHash]]:
    """Returns segments, as many for each of the nodes."""
    placement = Placement(dict.fromkeys(nodes, 1.0))
    left = Counter({node_id: _SEGMENTS // len(nodes) for node_id in nodes})
    chosen = []
    for number in itertools.count():
        chain = _chain(number)
        owner = placement.ranked(segment_key(chain[0]))[0]
        if left[owner]:
            left[owner] -= 1
            chosen.append(chain)
        if not left.total():
            break
    return chosen


def _chain(number: int) -> list[attnstore.BlockHash]:
    """Returns one segment: the first 64 blocks of a sequence."""
    tokens = [number, *range(1, SEGMENT_BLOCKS * _LAYOUT.block_tokens)]
    return attnstore.block_hashes(_NAMESPACE, tokens, _LAYOUT.block_tokens)


def run_client(url: str, nodes: int, seed: int, writes: bool) -> None:
    """Runs a client process: stores the pages if it is a writer, then reads for the requested time."""
    # All hosts of the switch share one file system, and therefore shared memory: only tcp and grpc use the links.
    with attnstore.connect(url, deadline_ms=_DEADLINE_MS, transport="tcp") as client:
        assert isinstance(client, attnstore.ClusterClient)
        while len(members := client.members()) < nodes:
            time.sleep(0.05)
        chains = balanced(sorted(member.node_id for member in members))
        client.register_layout(_NAMESPACE, _LAYOUT)
        if writes:
            content = random.Random(seed).randbytes(_LAYOUT.page_bytes)
            for chain in chains:
                written = client.write(_NAMESPACE, chain, [content] * SEGMENT_BLOCKS)
                assert all(verdict.is_kept for verdict in written.verdicts), written
        print("ready", flush=True)
        order = sys.stdin.readline()
        if not order:
            return
        until = time.monotonic() + json.loads(order)["seconds"]
        moved = [0] * _THREADS

        def read(thread: int) -> None:
            draws = random.Random(f"{seed} {thread}")
            buffers = [bytearray(_LAYOUT.page_bytes) for _ in range(_PAGES)]
            while time.monotonic() < until:
                begin = draws.randrange(0, SEGMENT_BLOCKS, _PAGES)
                result = client.read(_NAMESPACE, draws.choice(chains)[begin : begin + _PAGES], buffers)
                assert result.leading_hits == _PAGES, result
                moved[thread] += result.bytes_read

        threads = [threading.Thread(target=read, args=(number,)) for number in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps({"bytes": sum(moved)}), flush=True)


def main() -> int:
    """Measures, prints, writes. Always returns 0."""
    parser = CommandParser("python -m experiments.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--gbit", type=POSITIVE, default=1.0, help="rate of each node's link in Gb/s")
    parser.add_argument("--nodes", type=COUNT, nargs="+", default=[1, 3])
    parser.add_argument("--clients", type=COUNT, default=4, help=f"client processes, of {_THREADS} threads each")
    parser.add_argument("--seconds", type=POSITIVE, default=8.0, help="for each cell")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the figures")
    parser.add_argument("--client", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        run_client(**options.client)
        return 0
    cells = [measure_bandwidth(nodes, options.clients, options.gbit, options.seconds) for nodes in options.nodes]
    cost = measure_directory(max(options.nodes), options.clients, options.seconds)
    print(table(cells, cost))
    if options.json:
        figures = {"bandwidth": [asdict(cell) for cell in cells], "directory": asdict(cost)}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def table(cells: list[Bandwidth], cost: DirectoryCost) -> str:
    """Returns one line per cluster, then the directory's cost."""
    one = cells[0].gb_per_s
    lines = [("nodes", "clients", "Gb/s each", "GB/s", "share", "against one", f">= {_SCALING_MIN}x for 3")]
    for cell in cells:
        ratio = cell.gb_per_s / one
        verdict = "" if cell.nodes != 3 else "met" if ratio >= _SCALING_MIN else "MISSED"
        lines.append(
            (
                str(cell.nodes),
                str(cell.clients),
                f"{cell.gbit_per_s:g}",
                f"{cell.gb_per_s:.3f}",
                f"{cell.share:.1%}",
                f"{ratio:.2f}x",
                verdict,
            )
        )
    told = (
        f"directory: {cost.operations_per_s_node:.2f} operations/s a node, {cost.operations_per_s_client:.2f} a client, "
        f"{cost.network_bytes_per_s:.0f} B/s for {cost.nodes} nodes and {cost.clients} clients, "
        f"{cost.bytes_per_node:.0f} B kept a node"
    )
    return f"{aligned(lines, left=())}\n{told}"


if __name__ == "__main__":
    sys.exit(main())
