"""Models with sliding windows attend to blocks in the store, with the resident tokens; rows that see no page are not sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import attnstore
from attnstore.core.layout import DType
from attnstore.testing import StoreProcess
from attnstore_worker.cache.attending.step import NodeRows, SetRows
from attnstore_worker.engine import AttendPolicy, Engine, FinishReason, SamplingParams
from attnstore_worker.model import LoadedModel, load_model
from tests.worker.engine.test_attend import NEW_TOKENS, options, prompt, resident

WINDOW = 72
SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": 2,
    "sliding_window": WINDOW,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Gemma3": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 32},
}


@pytest.fixture(scope="module", params=list(KINDS))
def windowed(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Windows in all layers, or in one of two."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    kind = getattr(transformers, f"{request.param}ForCausalLM")
    module = kind(kind.config_class(**SIZES, **KINDS[request.param]))
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    module.save_pretrained(str(folder))
    transformers.AutoTokenizer.from_pretrained(str(tiny_folder)).save_pretrained(str(folder))
    return load_model(folder, DType.FP32)


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


@pytest.fixture(params=["tcp", "grpc"])
def client(request: pytest.FixtureRequest, node: StoreProcess) -> Iterator[attnstore.Client]:
    with attnstore.connect(node.url, transport=request.param, deadline_ms=60_000) as client:
        assert isinstance(client, attnstore.Client)
        yield client


@pytest.mark.parametrize(("tokens", "attend"), [(20 * 16, AttendPolicy.BEYOND_POOL), (6 * 16 + 5, AttendPolicy.ALWAYS)])
def test_the_tokens_are_those_of_a_resident_run(
    windowed: LoadedModel, client: attnstore.Client, request: pytest.FixtureRequest, tokens: int, attend: AttendPolicy
) -> None:
    wanted = options(windowed, request.node.name, attend)
    token_ids = prompt(tokens)
    with Engine(windowed, wanted, store=client, attend_store=client) as engine:
        for _ in range(2):  # the second time, the prompt's pages are there
            sequence = engine.generate(token_ids, SamplingParams(max_tokens=NEW_TOKENS))
            engine.check()
            assert sequence.finish_reason is FinishReason.LENGTH
            assert sequence.generated == resident(windowed, token_ids)
            assert engine.flush(60_000)
        statistics = engine.attending()
        assert statistics is not None
        assert statistics.rows > 0
        assert statistics.losses == 0


def pieces(
    window: int | None, *asked: SetRows, rows_max: int = 100
) -> list[tuple[tuple[tuple[int, int], ...], list[int], list[int]]]:
    stream: Any = None
    rows = NodeRows(stream, asked, rows_max, 16, window)
    return [(piece.sets, piece.rows.tolist(), piece.firsts) for piece in rows.pieces]


FAR, NEAR = SetRows(0, 0, 3, [0, 1], 64), SetRows(7, 3, 2, [0, 1], 32)
"""Three rows at 64 to 66 and two at 32 and 33, each about the pages of tokens 0 to 31."""


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (None, [(((0, 3), (7, 2)), [0, 1, 2, 3, 4], [])]),
        (100, [(((0, 3), (7, 2)), [0, 1, 2, 3, 4], [0, 0, 0, 0, 0])]),
        (40, [(((0, 3), (7, 2)), [0, 1, 2, 3, 4], [25, 26, 27, 0, 0])]),
        (34, [(((0, 1), (7, 2)), [0, 3, 4], [31, 0, 0])]),
        (20, [(((7, 2),), [3, 4], [13, 14])]),
        (1, []),
    ],
)
def test_rows_that_see_no_page_of_a_set_are_not_sent(window: int | None, expected: Callable[[], object]) -> None:
    assert pieces(window, FAR, NEAR) == expected


def test_pieces_carry_the_first_keys_of_their_rows() -> None:
    assert pieces(40, FAR, NEAR, rows_max=2) == [
        (((0, 2),), [0, 1], [25, 26]),
        (((0, 1),), [2], [27]),
        (((7, 2),), [3, 4], [0, 0]),
    ]
