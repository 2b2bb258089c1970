"""The tree of exceptions equals the drawing in the docstring, and each leaf has a code of its own."""

from __future__ import annotations

import re

import pytest

from attnstore import errors
from attnstore.errors import AttnStoreError


def leaves(cls: type[AttnStoreError]) -> list[type[AttnStoreError]]:
    children = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [leaf for child in children for leaf in leaves(child)] if children else [cls]


LEAVES = leaves(AttnStoreError)


def test_the_docstring_draws_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    branch = ""
    for line in (errors.__doc__ or "").splitlines():
        name = re.match(r"[ │├└─]*(\w+)", line)
        if "──" not in line or name is None:
            continue
        if line.startswith("    ├── ") or line.startswith("    └── "):
            branch = name[1]
        else:
            drawn.append((name[1], branch))
    assert drawn == [(leaf.__name__, leaf.__mro__[1].__name__) for leaf in LEAVES]


@pytest.mark.parametrize("leaf", LEAVES)
def test_each_error_is_known_by_its_code_and_says_whether_to_retry(leaf: type[AttnStoreError]) -> None:
    assert errors.error_of_code(leaf.code) is leaf
    assert leaf.retryable is issubclass(leaf, errors.Retryable)
    assert leaf.__doc__


def test_codes_are_distinct_and_unknown_ones_are_nobody() -> None:
    assert len({leaf.code for leaf in LEAVES}) == len(LEAVES)
    for code in ("", "error", "retryable", "not_retryable", "from the future"):
        assert errors.error_of_code(code) is None


def test_wrong_values_are_value_errors_too() -> None:
    for cls in (errors.InvalidArgument, errors.BufferMismatch):
        assert issubclass(cls, ValueError)
