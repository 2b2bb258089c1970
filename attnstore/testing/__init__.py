"""Test doubles and helpers that ship with the product: fakes for its own interfaces, and real nodes for tests."""

from attnstore.testing.clock import ManualClock
from attnstore.testing.node import StoreProcess
from attnstore.testing.redis_server import RedisServer, server_binaries

__all__ = ["ManualClock", "RedisServer", "StoreProcess", "server_binaries"]
