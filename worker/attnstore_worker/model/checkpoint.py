"""Weights from files: exactly the tensors that the model has.

Owns: `read_module`. Invariant: no weight of a returned module has its random initial value. transformers fills in tensors that a
checkpoint lacks and only reports it, so two loads of one checkpoint would give two different models.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import transformers

from attnstore_worker.errors import ModelUnavailable

_NAMED_MAX: Final = 3
"""The maximum number of tensors named in a message."""

_REPORTER: Final = logging.getLogger("transformers.modeling_utils")


def read_module(folder: Path, **options: Any) -> Any:
    """Returns transformers' causal language model of a folder; `options` as in its `from_pretrained`.

    Raises `ModelUnavailable` for tensors that are missing, unexpected or of another shape than in the config (transformers knows
    which are tied to others, and which superfluous ones old checkpoints have), and whatever transformers raises for damaged files.
    """
    with _without_report():
        module, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    faults = (
        ("missing", found["missing_keys"]),
        ("unexpected", found["unexpected_keys"]),
        ("of another shape", [name for name, _, _ in found["mismatched_keys"]]),
    )
    told = [f"{_some(names)} {'are' if len(names) > 1 else 'is'} {fault}" for fault, names in faults if names]
    if told:
        raise ModelUnavailable(f"the weights in {folder} do not fit its config: {'; '.join(told)}")
    return module


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppresses transformers' report of filled-in tensors, because here they are an error of one line.

    Not by the level of its logger: at a high level, transformers lists the layers that are not sharded.
    """
    _REPORTER.addFilter(_is_error)
    try:
        yield
    finally:
        _REPORTER.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMED_MAX])
    return shown if len(names) <= _NAMED_MAX else f"{shown} and {len(names) - _NAMED_MAX} more"
