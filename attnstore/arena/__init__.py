"""The bytes of the page slots: preallocated memory of a fixed capacity, with one contract and one module per kind of memory."""

from attnstore.arena.base import Arena
from attnstore.arena.file import FileArena
from attnstore.arena.memory import MemoryArena
from attnstore.arena.shm import ShmArena
from attnstore.arena.stamped import StampedArena
from attnstore.core.slots import extent_bytes_for

__all__ = ["Arena", "FileArena", "MemoryArena", "ShmArena", "StampedArena", "extent_bytes_for"]
