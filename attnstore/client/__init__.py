"""The client of a store node or of a cluster: one asynchronous client for each, blocking facades, and the transports below them."""

from attnstore.client.async_client import AsyncClient
from attnstore.client.blocking import Client, ClusterClient
from attnstore.client.cluster.client import AsyncClusterClient
from attnstore.client.options import ClusterOptions, ConnectOptions, options_of
from attnstore.client.transports.connection import NodeConnection

__all__ = [
    "AsyncClient",
    "AsyncClusterClient",
    "Client",
    "ClusterClient",
    "ClusterOptions",
    "ConnectOptions",
    "NodeConnection",
    "options_of",
]
