"""The file descriptors of a node and their uses.

Owns: the process's soft limit of descriptors. Invariant: connections to the gRPC port never take the descriptors that the arena,
the bulk transports, the metrics and the directory need.
"""

from __future__ import annotations

import resource

from attnstore.errors import InvalidArgument
from attnstore.limits import DESCRIPTORS_BESIDE_ARENA_MIN, GRPC_CONNECTIONS_MAX, GRPC_CONNECTIONS_MIN


def grpc_connections_max(arena_descriptors: int) -> int:
    """Raises the soft limit as far as the node needs it and returns how many connections gRPC may hold.

    Raises `InvalidArgument` if the hard limit leaves too few descriptors for a node.
    """
    least = arena_descriptors + DESCRIPTORS_BESIDE_ARENA_MIN
    most = least + GRPC_CONNECTIONS_MAX - GRPC_CONNECTIONS_MIN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most:
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= most:
        return GRPC_CONNECTIONS_MAX
    if soft < least:
        raise InvalidArgument(
            f"this node needs {least} file descriptors, {arena_descriptors} of them for its arena, and may have {soft}: "
            "raise `ulimit -Hn`, or lower the capacity"
        )
    return GRPC_CONNECTIONS_MIN + soft - least
