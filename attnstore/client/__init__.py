"""The client of a store node: one asynchronous core, a blocking facade, and the transports under them."""

from attnstore.client.async_client import AsyncClient
from attnstore.client.blocking import Client
from attnstore.client.options import ConnectOptions

__all__ = ["AsyncClient", "Client", "ConnectOptions"]
