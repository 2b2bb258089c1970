"""The client of a store node: one asynchronous core, a blocking facade, and the transports under them."""

from attnstore.client.async_client import AsyncClient, ConnectOptions
from attnstore.client.blocking import Client

__all__ = ["AsyncClient", "Client", "ConnectOptions"]
