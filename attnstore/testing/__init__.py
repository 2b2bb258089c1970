"""Test doubles and helpers that ship with the product: the fakes behind its own seams, and real nodes to test against."""

from attnstore.testing.clock import ManualClock
from attnstore.testing.node import StoreProcess
from attnstore.testing.redis_server import RedisServer, server_binaries

__all__ = ["ManualClock", "RedisServer", "StoreProcess", "server_binaries"]
