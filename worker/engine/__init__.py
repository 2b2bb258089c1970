"""The inference engine."""

from __future__ import annotations

from worker.engine.engine import BatchingStatistics, Engine, EngineOptions, Token
from worker.engine.sampler import SamplingParams
from worker.engine.sequence import FinishReason, Sequence

__all__ = ["BatchingStatistics", "Engine", "EngineOptions", "FinishReason", "SamplingParams", "Sequence", "Token"]
