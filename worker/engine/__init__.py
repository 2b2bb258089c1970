"""The inference engine."""

from __future__ import annotations

from worker.engine.async_engine import AsyncEngine, EngineSnapshot, TokenStream
from worker.engine.engine import Engine
from worker.engine.options import EngineOptions
from worker.engine.outputs import BatchingStatistics, Token
from worker.engine.sampler import SamplingParams
from worker.engine.sequence import FinishReason, Sequence

__all__ = [
    "AsyncEngine",
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
