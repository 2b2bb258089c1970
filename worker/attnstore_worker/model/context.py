"""The longest prompt in which a token's keys and values do not depend on later tokens.

Owns: `context_tokens_max`. Invariant: within it, the rotation of a position is the same in every prompt. Pages are found by a hash
of the tokens up to their end, so the bytes of a page must depend on those tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def context_tokens_max(config: Any) -> int:
    """Returns the trained length of a model, or the part of it within which its RoPE does not change with the length of the prompt.

    LongRoPE (Ding et al. 2024) has two sets of factors: transformers uses the long one for all positions of a call that reaches
    beyond `original_max_position_embeddings`. Dynamic NTK scaling changes its base only beyond `max_position_embeddings`.
    """
    trained: int = config.max_position_embeddings
    for rope in _ropes(config):
        if rope["rope_type"] == "longrope":
            trained = min(trained, int(rope["original_max_position_embeddings"]))
    return trained


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the parameters of each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *parameters.values()]:
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope
