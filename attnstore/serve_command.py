"""The command `attnstore serve`: a store node from its options, run until SIGTERM.

Owns: the assembly of a node with the client that it uses for other nodes. `attnstore.cli` imports this module when the command is
parsed, because the rest of the command line does not need the packages of `attnstore[node]`.
"""

from __future__ import annotations

import argparse

import uvloop

from attnstore import aio
from attnstore.allocator import keep_freed_memory
from attnstore.config import ServeOptions, ignored_variables, load_serve_options
from attnstore.directory import Member
from attnstore.logs import get_logger
from attnstore.peering import Peering
from attnstore.server.handoff import OpenPeer
from attnstore.server.log_output import configure_logs
from attnstore.server.node import serve

_log = get_logger(__name__)


def run_serve(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status. Raises `InvalidArgument` for an invalid option."""
    options = load_serve_options(arguments)
    configure_logs(options.log_level, options.log_format)
    for name, value in ignored_variables().items():
        _log.warning("variable ignored: Kubernetes set it for a Service (enableServiceLinks: false)", variable=name, value=value)
    keep_freed_memory()
    uvloop.run(serve(options, _peer_opener(options)))
    return 0


def _peer_opener(options: ServeOptions) -> OpenPeer:
    def open_peer(peering: Peering | None, member: Member, tenant: str) -> aio.AsyncClient:
        if peering is None:
            return aio.connect_member(member, None, token=None, tls_ca=options.peer_ca)
        return aio.connect_member(
            member, peering.check_of(member), token=peering.credential(member, tenant), tls_ca=options.peer_ca
        )

    return open_peer
