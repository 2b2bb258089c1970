"""The bytes of the page slots: preallocated memory of a fixed capacity, one contract and one file for each kind of memory."""

from attnstore.arena.base import Arena
from attnstore.arena.memory import MemoryArena
from attnstore.arena.shared import SharedArena
from attnstore.core.slots import extent_bytes_for

__all__ = ["Arena", "MemoryArena", "SharedArena", "extent_bytes_for"]
