"""The identity of a model's KV bytes, for the worker and for the vLLM connector.

Owns: the fingerprint, and which fields of a configuration it leaves out. Invariant: configurations that give different KV bytes
have different fingerprints, so every field that is not known to be bookkeeping counts, including nested and unknown ones
(docs/decisions/0061). Standard library only, because vLLM's processes import it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

BOOKKEEPING_FIELDS: Final[Mapping[str, str]] = {
    "_name_or_path": "where the files lie",
    "_commit_hash": "where the files come from; their bytes are in the digest of the weights",
    "transformers_version": "which version wrote or read the file",
    "dtype": "what the weights are stored in; what they are computed in stands beside the configuration",
    "torch_dtype": "the older name of dtype",
    "use_cache": "whether transformers keeps keys and values itself",
    "output_attentions": "what else a forward pass returns",
    "output_hidden_states": "what else a forward pass returns",
    "return_dict": "in which form a forward pass returns it",
    "bos_token_id": "which token begins a text; the tokens themselves are in a block's hash",
    "eos_token_id": "which token ends an answer",
    "id2label": "names of a classifier's classes",
    "label2id": "names of a classifier's classes",
    "problem_type": "the loss of a classifier",
}
"""Fields that never change a KV byte and may differ between copies of one model or versions of the software; with the reason."""


def config_fields(config: Any) -> dict[str, Any]:
    """Returns the fields of a transformers config that may change KV bytes, including nested configs, as JSON values.

    It leaves out `BOOKKEEPING_FIELDS`, and fields that are None or False both here and by default in the config's class: a new
    version of transformers with a new optional field therefore does not change the fingerprints of existing models.
    """
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in BOOKKEEPING_FIELDS or ((value is None or value is False) and getattr(type(config), name, ...) is value):
            continue
        nested = getattr(config, name, None)
        fields[name] = config_fields(nested) if hasattr(nested, "to_dict") else _canonical(value)
    return fields


def fingerprint(**identity: Any) -> bytes:
    """Returns 32 bytes that identify everything in `identity`, JSON values. The order of fields makes no difference, nor does 1.0
    for 1.
    """
    described = json.dumps(_canonical(identity), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(described.encode(), digest_size=32, person=b"attnstore-finger").digest()


def _canonical(value: Any) -> Any:
    """JSON writes keys as text, and one number in several ways."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
