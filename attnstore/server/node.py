"""One store node: assembly, start, drain and stop.

Owns: the life of the process. All parts of a node are created here from `ServeOptions` and passed down; nothing is global.
Invariant: on SIGTERM or SIGINT no new call is accepted, running calls get `drain_ms` to finish, and only then is the arena
released. The process ends within `STOP_MS_MAX` after that, whatever still runs.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
import time
from importlib.metadata import version

import grpc

from attnstore import tasks
from attnstore.address import Address
from attnstore.arena import Arena, FileArena, MemoryArena, ShmArena, StampedArena, extent_bytes_for
from attnstore.clock import Clock, MonotonicClock
from attnstore.config import ServeOptions
from attnstore.core.heat import SegmentHeat
from attnstore.core.page_table import PageTable
from attnstore.directory.deletions import DeletionFeed
from attnstore.directory.events import EventFeed
from attnstore.errors import InvalidArgument
from attnstore.extras import needs_extra
from attnstore.limits import (
    CONNECT_MS_MAX,
    EPOCH_BYTES,
    FRAME_BYTES_MAX,
    GRPC_CALLS_MAX,
    GRPC_IDLE_MS_MAX,
    KEEPALIVE_MS,
    KEEPALIVE_TIMEOUT_MS,
    LEASE_ID_BYTES,
    MESSAGE_BYTES_MAX,
    NODE_OTHER_BYTES_MIN,
    STOP_MS_MAX,
)
from attnstore.logs import get_logger
from attnstore.memory_limit import memory_bytes, require_memory
from attnstore.server.attend import Attending, threads_default
from attnstore.server.certificate import Certificate
from attnstore.server.collection import Collection
from attnstore.server.descriptors import grpc_connections_max
from attnstore.server.events import EventHub
from attnstore.server.handoff import OpenPeer
from attnstore.server.membership import node_membership, own_record, peering_of
from attnstore.server.metrics_endpoint import MetricsEndpoint
from attnstore.server.open_services import OpenServices
from attnstore.server.page_channel import PageChannelServer, TokenBook
from attnstore.server.rpc import Authenticator, RpcShell
from attnstore.server.scrubber import Scrubber
from attnstore.server.servicer import ChannelOffer, NodeIdentity, Servicer
from attnstore.server.shm import ShmServer
from attnstore.server.slices import finish_among_calls
from attnstore.server.store import Store
from attnstore.telemetry import NodeMetrics
from attnstore.wire.messages import METHODS, SERVICE
from attnstore.wire.shm import SHM_FILE_OFFER

_EXPIRY_PERIOD_S = 1.0
_LAG_PERIOD_S = 0.1
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", FRAME_BYTES_MAX),
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", GRPC_CALLS_MAX),
    # Limits how long a peer that connects and sends nothing holds a descriptor.
    ("grpc.server_handshake_timeout_ms", CONNECT_MS_MAX),
    ("grpc.max_connection_idle_ms", GRPC_IDLE_MS_MAX),
    # Limits how long a caller whose machine vanished holds a stream, its pins and its slots.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Clients ping as often; without this setting gRPC would treat them as a flood and disconnect them.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
)

_log = get_logger(__name__)


class StoreNode:
    """A node on the running event loop, bound to its `address`. Call `start`, then `stop` once.

    `collection` is given by the owner of the process, which has one garbage collector. `open_peer` connects to other nodes of the
    cluster; it is injected, because the server does not import the client.

    Raises `InvalidArgument` naming the option if an address cannot be bound, a file cannot be read or memory cannot be allocated.
    """

    def __init__(self, options: ServeOptions, open_peer: OpenPeer, clock: Clock | None = None) -> None:
        clock = clock or MonotonicClock()
        self._options = options
        self._loop = asyncio.get_running_loop()
        # Wrong options are found before the arena's memory is allocated.
        tenants = options.tenants()
        self._certificate = _certificate(options)
        _require_memory(options)
        extent_bytes = extent_bytes_for(options.capacity)
        arena_type = _arena_type(options)
        connections_max = grpc_connections_max(arena_type.descriptors_per_extent * (options.capacity // extent_bytes))
        self._server = grpc.aio.server(options=(*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections_max)))
        self.address = self._bind()
        epoch = secrets.token_bytes(EPOCH_BYTES)
        member = own_record(options, self.address, epoch)
        peering = peering_of(options, member)
        authenticator = Authenticator(tenants, peering)
        self._arena = _arena(options, extent_bytes)
        offers_memory = "shm" in options.bulk_transports() and _may_be_mapped(options)
        table = PageTable(
            capacity_bytes=options.capacity,
            extent_bytes=extent_bytes,
            new_lease_id=lambda: secrets.token_bytes(LEASE_ID_BYTES),
            tenants=authenticator.tenants,
        )
        hub = EventHub(self._loop, authenticator.tenants)
        feed = EventFeed(member.node_id, authenticator.tenants)
        deletions = DeletionFeed(clock)
        publish = hub.publish if options.directory is None else hub.publish_also_to(feed.offer)
        heat = None if options.directory is None else SegmentHeat(options.hot_uses, authenticator.tenants)
        self._store = Store(table, self._arena, clock, publish, heat)
        self.collection = Collection(self._store)
        self._metrics = NodeMetrics(self._store.statistics)
        self._metrics.certificate_expiry.set(0 if self._certificate is None else self._certificate.ends_s)
        self._shell = RpcShell(authenticator, self._metrics)
        self._tokens = TokenBook(clock, authenticator.tenants)
        self._attending = self._make_attending(clock, authenticator.tenants)
        self._page_channel = PageChannelServer(
            self._store,
            self._tokens,
            self._metrics,
            stall_ms=options.stall_ms,
            attending=self._attending,
            tenants=authenticator.tenants,
        )
        self._shm = (
            ShmServer(
                self._store,
                self._arena,
                TokenBook(clock, authenticator.tenants),
                self._metrics,
                clock,
                epoch=epoch,
                stall_ms=options.stall_ms,
                tenants=authenticator.tenants,
            )
            if offers_memory and isinstance(self._arena, StampedArena)
            else None
        )
        self._channels: dict[str, ChannelOffer] = {}
        self._membership = node_membership(
            options,
            member=member,
            peering=peering,
            store=self._store,
            metrics=self._metrics,
            clock=clock,
            feed=feed,
            deletions=deletions,
            open_peer=open_peer,
        )
        self._scrubber = Scrubber(self._store, int(options.scrub_rate))
        self._servicer = Servicer(
            identity=NodeIdentity(member.node_id, epoch, version("attnstore")),
            store=self._store,
            scrubber=self._scrubber,
            hub=hub,
            metrics=self._metrics,
            stall_ms=options.stall_ms,
            streams_in_flight=lambda: self._shell.streams_in_flight,
            channels=self._channels,
            attending=self._attending,
            deletions=None if options.directory is None else deletions,
        )
        self._open_services = OpenServices(self._server, (SERVICE,))
        self._metrics_endpoint: MetricsEndpoint | None = None
        self._background: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Starts to serve. Raises `InvalidArgument` if the metrics port cannot be bound."""
        self._server.add_generic_rpc_handlers((self._shell.generic_handler(self._servicer.handlers(), METHODS),))
        if "tcp" in self._options.bulk_transports():
            self._page_channel.start(self.address.at(self._options.page_channel_port))
            self._channels["tcp"] = ChannelOffer(f":{self._page_channel.port}", self._tokens.issue)
        if self._shm is not None:
            self._shm.start()
            offer = "shm" if self._options.arena_path is None else SHM_FILE_OFFER
            self._channels[offer] = ChannelOffer(self._shm.address, self._shm.tokens.issue)
        if self._options.metrics_port is not None:
            self._serve_metrics(self._options.metrics_port)
        await self._server.start()
        await self._open_services.serving()
        self._background = {
            "expiry": tasks.supervised("expiry", self._expire_leases),
            "loop lag": tasks.supervised("loop lag", self._observe_loop_lag),
        }
        self._scrubber.start()
        if self._membership is not None:
            self._membership.start()
        _log.info("serving", address=str(self.address), capacity_bytes=int(self._options.capacity), pid=os.getpid())

    async def stop(self, drain_ms: int | None = None) -> None:
        """Accepts no new call, waits up to `drain_ms` (default: the option) for running calls, then releases everything.

        Ends within `STOP_MS_MAX` after that: a step that fails or does not end is logged and does not block the others.
        """
        drain_ms = self._options.drain_ms if drain_ms is None else drain_ms
        _log.info("draining", streams_in_flight=self._shell.streams_in_flight, drain_ms=drain_ms)
        self._servicer.drain()
        # All kinds of calls drain at the same time, under the same limit.
        drains = {
            "health": self._open_services.draining(),
            "calls": self._server.stop(drain_ms / 1000),
            "page channels": tasks.on_thread("stop", lambda: self._page_channel.stop(drain_ms)),
            "scrubber": self._scrubber.stop(),
        }
        if self._shm is not None:
            stop_shm = self._shm.stop
            drains["shared memory"] = tasks.on_thread("stop", lambda: stop_shm(drain_ms))
        if self._membership is not None:
            drains["membership"] = self._membership.stop()
        await tasks.attempt_all(drains, (drain_ms + STOP_MS_MAX / 2) / 1000)
        ends = {name: tasks.end(task) for name, task in self._background.items()}
        if self._metrics_endpoint is not None:
            ends["metrics"] = tasks.on_thread("stop", self._metrics_endpoint.stop)
        # Views of the arena that a computation still uses keep its memory mapped.
        ends["arena"] = tasks.on_thread("stop", self._arena.close)
        await tasks.attempt_all(ends, STOP_MS_MAX / 4 / 1000)
        _log.info("stopped")

    def _make_attending(self, clock: Clock, tenants: int) -> Attending | None:
        threads = self._options.attend_threads
        if threads == 0:
            return None
        if threads is None and not Attending.is_possible():
            return None
        with needs_extra("attention", f"--attend-threads {threads}"):
            attending = Attending(self._store, clock, threads or threads_default(), tenants)
        attending.warm_up()
        return attending

    def _bind(self) -> Address:
        address, credentials = self._options.address, self._credentials()
        try:
            port = (
                self._server.add_insecure_port(str(address))
                if credentials is None
                else self._server.add_secure_port(str(address), credentials)
            )
        except RuntimeError:
            raise InvalidArgument(f"--listen {address} cannot be bound: not an address of this machine, or in use") from None
        return address.at(port)

    def _credentials(self) -> grpc.ServerCredentials | None:
        cert, key = self._options.tls_cert, self._options.tls_key
        if cert is None or key is None:
            return None
        return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])

    def _serve_metrics(self, port: int) -> None:
        try:
            listeners = self.address.at(port).listen()
        except OSError as error:
            raise InvalidArgument(f"--metrics-port {port} cannot be bound: {error.strerror}") from None
        self._metrics_endpoint = MetricsEndpoint(self._metrics.registry, listeners, self._store)

    async def _expire_leases(self) -> None:
        # Every use of a lease compares it with the clock; this only frees the pages of silent clients in time.
        while True:
            await asyncio.sleep(_EXPIRY_PERIOD_S)
            await finish_among_calls(self._store.spaces.sweeping())
            if self._attending is not None:
                await self._loop.run_in_executor(self._attending.executor, self._attending.expire)

    async def _observe_loop_lag(self) -> None:
        while True:
            due_s = self._loop.time() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._metrics.loop_lag.observe(max(0.0, self._loop.time() - due_s))


def _arena_type(options: ServeOptions) -> type[Arena]:
    if options.arena_path is not None:
        return FileArena
    return ShmArena if "shm" in options.bulk_transports() else MemoryArena


def _certificate(options: ServeOptions) -> Certificate | None:
    """Checked here, because gRPC reports a bad pair of files as a problem of the port, and accepts an expired certificate."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    certificate = Certificate.load(options.tls_cert, options.tls_key)
    now_s = time.time()
    certificate.check(now_s)
    days_left = certificate.days_left(now_s)
    if days_left is not None:
        _log.warning("the certificate expires soon", tls_cert=str(options.tls_cert), days_left=days_left)
    return certificate


def _require_memory(options: ServeOptions) -> None:
    if options.arena_path is None:  # otherwise the memory belongs to a device or the file system
        warning = require_memory("--capacity", options.capacity, NODE_OTHER_BYTES_MIN, memory_bytes())
        if warning is not None:
            _log.warning(warning)


def _arena(options: ServeOptions, extent_bytes: int) -> Arena:
    if options.arena_path is not None:
        return FileArena(options.capacity, extent_bytes, options.arena_path)
    return _arena_type(options)(options.capacity, extent_bytes)


def _may_be_mapped(options: ServeOptions) -> bool:
    """Returns whether memory that one tenant maps contains no page of another tenant."""
    return options.arena_path is None or len(options.tenants()) <= 1


async def serve(options: ServeOptions, open_peer: OpenPeer) -> None:
    """Runs a node until SIGTERM or SIGINT. Prints `listening on HOST:PORT` to standard output when it is ready."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = StoreNode(options, open_peer)
    node.collection.freeze()
    collecting = tasks.supervised("collection", node.collection.run)
    try:
        await node.start()
        print(f"listening on {node.address}", flush=True)
        await stop.wait()
    finally:
        # Python waits for running threads when a process ends, and these may compute or resolve a name for long.
        last = threading.Timer((options.drain_ms + STOP_MS_MAX) / 1000, os._exit, (0,))
        last.daemon = True
        last.start()
        collecting.cancel()
        await node.stop()
