"""The inference engine."""

from __future__ import annotations

from attnstore_worker.engine.async_engine import AsyncEngine, EngineSnapshot, TokenStream
from attnstore_worker.engine.engine import Engine
from attnstore_worker.engine.outputs import BatchingStatistics, Token
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.sequence import FinishReason, Sequence
from attnstore_worker.options import AttendPolicy, EngineOptions

__all__ = [
    "AsyncEngine",
    "AttendPolicy",
    "BatchingStatistics",
    "Engine",
    "EngineOptions",
    "EngineSnapshot",
    "FinishReason",
    "SamplingParams",
    "Sequence",
    "Token",
    "TokenStream",
]
