"""A layer's requests to its attention reach the backend, and a store node gets only requests that it supports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor

from attnstore.attention import create_attention, merge
from attnstore_worker.cache.attending.step import RemoteStep
from attnstore_worker.device.host import HostDevice
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.decoder import TransformersDecoder, create_decoder
from tests.attention.cases import paged

HEADS, KV_HEADS, HEAD_DIM, TOKENS, REMOTE_TOKENS, SCALE = 4, 2, 64, 80, 48, 0.25


@dataclass
class Remote:
    """Answers like the nodes that have a sequence's first blocks."""

    answer: tuple[Tensor, Tensor]
    windows: list[int | None] = field(default_factory=list)

    def ask(self, layer: int, query: Tensor, window: int | None = None) -> None:
        del layer, query
        self.windows.append(window)

    def merge(self, out: Tensor, lse: Tensor) -> Tensor:
        return merge([out, self.answer[0]], [lse, self.answer[1]])[0]


@dataclass(frozen=True)
class Layer:
    """One layer's query, of the last token, and the keys and values of all tokens, `[kv_heads, TOKENS, HEAD_DIM]`."""

    query: Tensor
    keys: Tensor
    values: Tensor

    def whole(self, **asked: Any) -> Tensor:
        tables = paged(self.keys, self.values, 1)
        out, _ = create_attention("reference").paged_attention(self.query, *tables, layer=0, scale=SCALE, **asked)
        return out

    def step(self, first: int, remote: Remote | None = None) -> PagedStep:
        """Returns the last token's step over the keys from `first` on; its own key is not stored yet."""
        pool, table, lens, starts = paged(self.keys[:, first:], self.values[:, first:], 1)
        last = int(lens[0]) - 1
        block = table[0, last // 16].long().view(1)
        pool[block, :, :, :, last % 16] = 7.0
        return PagedStep(
            create_attention("cpu"), pool, block, torch.tensor([last % 16]), table, lens, starts, at_once, cast(RemoteStep, remote)
        )

    def attend(self, step: PagedStep, **asked: Any) -> Tensor:
        own = torch.stack((self.keys[:, -1], self.values[:, -1])).unsqueeze(0)
        return step.attend(0, self.query, own, scale=SCALE, **asked)


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer(torch.randn(1, HEADS, HEAD_DIM), *torch.randn(2, KV_HEADS, TOKENS, HEAD_DIM))


@pytest.mark.parametrize("asked", [{"soft_cap": 1.5}, {"sinks": torch.arange(4.0)}, {"sliding_window": 20}], ids=str)
def test_caps_sinks_and_windows_reach_the_backend(layer: Layer, asked: dict[str, Any]) -> None:
    torch.testing.assert_close(layer.attend(layer.step(0), **asked), layer.whole(**asked), rtol=0, atol=2e-5)
    assert not torch.allclose(layer.whole(**asked), layer.whole(), atol=1e-2)


def test_a_sink_counts_once_where_store_nodes_answer_over_other_keys(layer: Layer) -> None:
    sinks = torch.arange(4.0)
    tables = paged(layer.keys[:, :REMOTE_TOKENS], layer.values[:, :REMOTE_TOKENS], 1)
    answer = create_attention("reference").paged_attention(layer.query, *tables, layer=0, scale=SCALE)
    step = layer.step(REMOTE_TOKENS, Remote(answer))
    torch.testing.assert_close(layer.attend(step, sinks=sinks), layer.whole(sinks=sinks), rtol=0, atol=2e-5)


def test_store_nodes_are_not_asked_for_capped_scores(layer: Layer) -> None:
    step = layer.step(REMOTE_TOKENS, Remote((torch.empty(0), torch.empty(0))))
    with pytest.raises(AssertionError, match="nodes answer"):
        layer.attend(step, soft_cap=1.5)


def test_store_nodes_are_asked_through_the_window_that_the_layer_has(layer: Layer) -> None:
    tables = paged(layer.keys[:, :REMOTE_TOKENS], layer.values[:, :REMOTE_TOKENS], 1)
    seen = {"query_positions": torch.tensor([TOKENS - 1], dtype=torch.int32), "sliding_window": 40}
    answer = create_attention("reference").paged_attention(layer.query, *tables, layer=0, scale=SCALE, **seen)
    remote = Remote(answer)
    out = layer.attend(layer.step(REMOTE_TOKENS, remote), sliding_window=40)
    torch.testing.assert_close(out, layer.whole(sliding_window=40), rtol=0, atol=2e-5)
    assert remote.windows == [40]


def module_of(kind: str) -> Any:
    """Returns the smallest possible model of that kind."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=128, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Gemma2", "GptOss"])
def test_the_decoder_for_plain_llamas_takes_no_model_with_caps_or_sinks(kind: str) -> None:
    assert isinstance(create_decoder(module_of(kind), HostDevice()), TransformersDecoder)
