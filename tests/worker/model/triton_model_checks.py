"""Checks that `test_device_model` runs in a process of its own: the model on a device with Triton, interpreted or on a GPU.

The row kernels against the same operations in fp64; the decoder against the CPU's decoder on the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import triton
from torch import Tensor, nn
from torch.nn import functional

from attnstore.attention import AttentionBackend, create_attention, merge
from attnstore.core.layout import DType
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.attention import ATTENTION_NAME, register_attention
from attnstore_worker.model.decoder import Decoder, TransformersDecoder
from attnstore_worker.model.llama_device import DeviceLlamaDecoder, rotation_table
from attnstore_worker.model.loading import ready_model
from attnstore_worker.model.triton_rows import gated, normalized, rotated_and_put
from tests.interpreter import cache_interpreter, omit_overflow_checks
from tests.worker.model.devices import TritonDevice
from tests.worker.model.steps import UNUSED, Pages, Spans

cache_interpreter()
omit_overflow_checks()

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
PLACE = torch.device(DEVICE)
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of a value: a rounding to the type, and what fp32 loses before it."""

EPSILON = 1e-5
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    torch.manual_seed(seed + sum(shape))
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_near(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = scale * ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("width", [64, 80, 576, 4096])
def test_a_norm_is_that_of_fp64_rounded(dtype: torch.dtype, width: int) -> None:
    hidden, weight = drawn(3, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    exact = functional.rms_norm(hidden.double(), (width,), weight.double(), EPSILON)
    assert_near(normalized(hidden, weight, EPSILON), exact)


@DTYPES
@pytest.mark.parametrize("width", [64, 576])
def test_a_sum_is_rounded_before_its_norm(dtype: torch.dtype, width: int) -> None:
    hidden, delta, weight = (drawn(*shape, dtype=dtype) for shape in ((5, width), (5, width), (width,)))
    total = hidden + delta
    got = normalized(hidden, weight, EPSILON, delta)
    torch.testing.assert_close(hidden, total, rtol=0, atol=0)
    assert_near(got, functional.rms_norm(total.double(), (width,), weight.double(), EPSILON))


@DTYPES
@pytest.mark.parametrize("width", [128, 1500])
def test_a_gated_product_is_that_of_fp64_rounded(dtype: torch.dtype, width: int) -> None:
    rows = drawn(4, 2 * width, dtype=dtype)
    gate, up = rows.double().chunk(2, dim=1)
    assert_near(gated(rows), functional.silu(gate) * up)


@DTYPES
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(3, 1, 64), (9, 3, 80), (2, 2, 96), (4, 1, 128)])
def test_queries_are_rotated_and_keys_and_values_stored(dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int) -> None:
    block_tokens, layers, layer, rows = 16, 2, 1, 5
    heads = drawn(rows, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = drawn(40, head_dim // 2, seed=3)
    positions = torch.tensor([0, 39, 7, 16, 2], device=DEVICE)
    blocks, offsets = torch.tensor([4, 0, 4, 2, 3], device=DEVICE), torch.tensor([0, 15, 3, 8, 1], device=DEVICE)
    pool = torch.full((5, layers, 2, kv_heads, block_tokens, head_dim), 7.0, dtype=dtype, device=DEVICE)
    query = rotated_and_put(heads, (angles.cos(), angles.sin()), positions, (blocks, offsets), pool, layer)

    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[positions][:, None]
    first, second = heads.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    assert_near(query, exact[:, :q_heads])
    stored = pool[blocks, layer, :, :, offsets]
    assert_near(stored[:, 0], exact[:, q_heads : q_heads + kv_heads])
    assert torch.equal(stored[:, 1], heads[:, q_heads + kv_heads :])
    untouched = torch.ones((*pool.shape[:2], block_tokens), dtype=torch.bool, device=DEVICE)
    untouched[blocks, layer, offsets] = False
    assert (pool.permute(0, 1, 4, 2, 3, 5)[untouched] == 7.0).all()


@pytest.fixture(scope="module")
def on_device(tiny_folder: Path) -> LoadedModel:
    """The tiny model, which has passed its self-test on the device."""
    return load_model(tiny_folder, DType.FP32, device=TritonDevice(PLACE))


BATCHES: dict[str, Spans] = {
    "prefill": [(0, 40)],
    "decode": [(40, 41), (7, 8), (16, 17)],
    "mixed": [(32, 60), (3, 4), (0, 21), (15, 17)],
}
TOLERANCE = 1e-4


def pages_of(model: LoadedModel, spans: Spans, place: torch.device, content: float = math.nan) -> Pages:
    vocabulary = model.module.config.vocab_size
    return Pages.of(model.layout(16), [end for _, end in spans], place, vocabulary=vocabulary, content=content)


def compute_before(model: LoadedModel, pages: Pages, backend: AttentionBackend, spans: Spans) -> None:
    """Computes the tokens before the spans."""
    if any(begin for begin, _ in spans):
        pages.asked(backend, [(0, begin) for begin, _ in spans]).logits(model.decoder)


def expected_logits(tiny: LoadedModel, spans: Spans) -> Tensor:
    """Returns the logits of the CPU's decoder."""
    pages, backend = pages_of(tiny, spans, torch.device("cpu"), 0.0), create_attention("cpu")
    compute_before(tiny, pages, backend, spans)
    return pages.asked(backend, spans).logits(tiny.decoder)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(got.argmax(dim=-1).cpu(), expected.argmax(dim=-1))


@pytest.mark.parametrize(("batch", "padding"), [("prefill", 0), ("decode", 0), ("decode", 5), ("mixed", 3)])
def test_logits_are_those_of_the_cpus_decoder(tiny: LoadedModel, on_device: LoadedModel, batch: str, padding: int) -> None:
    """All memory holds NaN before it is written; rows of padding write none."""
    assert isinstance(on_device.decoder, DeviceLlamaDecoder)
    spans = BATCHES[batch]
    pages, backend = pages_of(on_device, spans, PLACE), create_attention("triton")
    compute_before(on_device, pages, backend, spans)
    assert_same(pages.asked(backend, spans, padding=padding).logits(on_device.decoder), expected_logits(tiny, spans))
    assert pages.pool[UNUSED].isnan().all()


def test_weights_are_held_once_and_the_module_still_runs_by_itself(on_device: LoadedModel) -> None:
    module = on_device.module
    for layer in module.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for parts in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            [together] = {part.weight.untyped_storage().data_ptr() for part in parts}
            assert together == parts[0].weight.data_ptr()
            assert parts[0].weight.untyped_storage().nbytes() == sum(part.weight.nbytes for part in parts)
    asked = pages_of(on_device, [(0, 9)], PLACE).asked(create_attention("triton"), [(0, 9)])
    module.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            expected = module(asked.token_ids[None], use_cache=False).logits[0]
    finally:
        module.set_attn_implementation(ATTENTION_NAME)
    assert_same(asked.logits(on_device.decoder), expected.cpu())


def test_only_the_wanted_rows_have_logits(on_device: LoadedModel) -> None:
    spans: Spans = [(0, 3), (0, 5)]
    asked = pages_of(on_device, spans, PLACE).asked(create_attention("triton"), spans)
    every = asked.logits(on_device.decoder)
    for rows in ([5, 0, 7], []):
        wanted = torch.tensor(rows, dtype=torch.int64, device=PLACE)
        got = asked._replace(rows=wanted).logits(on_device.decoder)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, every[wanted], rtol=0, atol=1e-5)


def test_a_layer_is_read_after_its_pages_have_arrived(tiny: LoadedModel, on_device: LoadedModel) -> None:
    spans, backend = BATCHES["decode"], create_attention("triton")
    pages = pages_of(on_device, spans, PLACE)
    compute_before(on_device, pages, backend, spans)
    known = pages.pool.clone()
    pages.pool.fill_(math.nan)

    def arrive(layer: int) -> None:
        pages.pool[:, layer] = known[:, layer]

    assert_same(pages.asked(backend, spans, before_layer=arrive).logits(on_device.decoder), expected_logits(tiny, spans))


@dataclass
class Node:
    """A store node that attends to the first block of each sequence."""

    pages: Pages
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: list[int] = field(default_factory=list)

    def ask(self, layer: int, query: Tensor, window: int | None = None) -> None:
        assert window is None
        self.layers.append(layer)
        self.query = query

    def merge(self, out: Tensor, lse: Tensor) -> Tensor:
        rows, block_tokens = len(self.query), self.pages.layout.block_tokens
        part = create_attention("reference").paged_attention(
            self.query.float(),
            self.pages.pool,
            torch.tensor([[table[0]] for table in self.pages.tables], dtype=torch.int32, device=PLACE),
            torch.full((rows,), block_tokens, dtype=torch.int32, device=PLACE),
            torch.arange(rows + 1, dtype=torch.int32, device=PLACE),
            layer=self.layers[-1],
            scale=self.query.shape[-1] ** -0.5,
        )
        return merge([out, part[0]], [lse, part[1]])[0]


def test_partials_of_store_nodes_are_merged_in_every_layer(tiny: LoadedModel, on_device: LoadedModel) -> None:
    spans, backend = [(40, 41), (20, 21), (16, 17)], create_attention("triton")
    pages = pages_of(on_device, spans, PLACE)
    compute_before(on_device, pages, backend, spans)
    node = Node(pages)
    got = pages.asked(backend, spans, behind=1, remote=node).logits(on_device.decoder)
    assert node.layers == [0, 1]
    assert_same(got, expected_logits(tiny, spans))


SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied, a size without power of two": {"tie_word_embeddings": True, "hidden_size": 72, "head_dim": 80},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
}  # fmt: skip


def self_test(kind: str, dtype: DType, **fields: Any) -> Decoder:
    """Returns the decoder of a small random model, which has passed the self-test on the device."""
    torch.manual_seed(3)
    module = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**SMALL, **fields}))
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    module = module.eval().requires_grad_(False).to(TORCH_DTYPES[dtype]).to(PLACE)
    register_attention()
    module.set_attn_implementation(ATTENTION_NAME)
    model = ready_model(
        module,
        SimpleNamespace(eos_token_id=None),
        name=kind,
        origin=kind,
        dtype=dtype,
        weights=kind,
        attention=create_attention("triton"),
        device=TritonDevice(PLACE),
    )
    return model.decoder


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_plain_llama_passes_its_self_test(fields: dict[str, Any]) -> None:
    assert isinstance(self_test("Llama", DType.FP32, **fields), DeviceLlamaDecoder)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16], ids=str)
def test_a_llama_in_16_bits_passes_its_self_test(dtype: DType) -> None:
    assert isinstance(self_test("Llama", dtype), DeviceLlamaDecoder)


def test_another_model_runs_through_transformers() -> None:
    decoder = self_test("Qwen3", DType.FP32, head_dim=32)
    assert isinstance(decoder, TransformersDecoder)
    assert not decoder.capturable


def test_a_model_that_cannot_run_on_pages_is_refused_by_name() -> None:
    with pytest.raises(ModelUnavailable, match="Bloom"):
        self_test("Bloom", DType.FP32, n_head=4, n_layer=2)


def test_angles_of_all_positions_are_those_of_the_model(on_device: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = on_device.module.model.rotary_emb
    monkeypatch.setattr("attnstore_worker.model.llama_device._ANGLE_POSITIONS", 100)
    cosines, sines = rotation_table(rotary, on_device.context_tokens_max, PLACE)
    expected = rotary(torch.empty(0, device=PLACE), torch.arange(on_device.context_tokens_max, device=PLACE)[None])
    for got, whole in zip((cosines, sines), expected, strict=True):
        assert torch.equal(got, whole[0, :, : got.shape[1]])
