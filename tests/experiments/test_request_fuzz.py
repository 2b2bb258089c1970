"""Invalid requests to a real worker: a few hundred of them, and the definition of a wrong answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnstore_worker.testing import write_tiny_model
from experiments.request_fuzz.generator import FuzzedRequest, requests
from experiments.request_fuzz.run import BATCH, fuzz, judge

SEED = 18
COUNT = 300


@pytest.mark.timeout(600)
def test_wrong_requests_are_refused_in_one_line_and_right_ones_beside_them_are_answered(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, context_tokens_max=128)
    outcome = fuzz(tmp_path, seed=SEED, count=COUNT)
    assert outcome.faults == [], f"with seed {SEED}"
    assert outcome.right_answers == COUNT // BATCH
    assert outcome.statuses.total() == COUNT
    assert outcome.statuses[200] > COUNT // 20
    assert outcome.statuses[400] > COUNT // 2


def test_a_seed_gives_the_same_requests() -> None:
    first, again, other = ([request.wire() for request in requests(seed, 200, "m")] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("status", "body", "wrong"),
    [
        (500, b'{"error": {"message": "internal error"}}', "blames no request"),
        (503, b"", "blames no request"),
        (400, b'{"error": {"message": ""}}', "not one line"),
        (400, b'{"error": {"message": "a\\nb"}}', "not one line"),
        (400, b'{"error": {"message": "%s"}}' % (b"x" * 500), "not one line"),
        (200, b'data: {"error": {"message": "x"}}\n\n', "in a stream"),
        (0, b"", "no answer"),
        (400, b'{"error": {"message": "n: wrong"}}', None),
        (400, b"Invalid HTTP request received.", None),
        (200, b"{}", None),
    ],
)
def test_an_answer_is_judged(status: int, body: bytes, wrong: str | None) -> None:
    judged = judge(FuzzedRequest("/", b""), status, body)
    assert judged is None if wrong is None else judged is not None and wrong in judged
    assert judge(FuzzedRequest("/", b"", complete=False), 0, b"") is None
