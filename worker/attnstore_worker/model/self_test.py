"""The comparison of a model with its own code at load, before any of its tokens is used.

Owns: `SelfTest`. Invariant: a model that passes gives, through pages and in chunks, the logits of its own forward pass up to
rounding. No list of names could cover all ways in which a model's code may need more than paged attention offers, or keep state of
its own.

The prompt is short. Features that take effect only at a distance are checked by their rules instead: each layer's mask is queried
for pairs of positions far apart, and `context_tokens_max` bounds the effect of a RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from attnstore.attention import AttentionBackend
from attnstore.core.layout import PageLayout
from attnstore_worker.device.base import Device
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.errors import DeviceLost, ModelUnavailable, OutOfDeviceMemory
from attnstore_worker.model.attention import ATTENTION_NAME, PagedStep, at_once, paged_attention_forward
from attnstore_worker.model.decoder import Decoder


class Tolerance(NamedTuple):
    """The allowed difference of logits from the module's own: the distance of two rows as vectors, relative to the row's length, at
    a quantile of the rows.
    """

    distance: float
    quantile: float


TOLERANCE: Final = {
    torch.float32: Tolerance(1e-4, 1.0),
    torch.float16: Tolerance(0.03, 0.5),
    torch.bfloat16: Tolerance(0.15, 0.5),
}
"""Measured on random models of 15 architectures: in fp32 the worst rows are at 1e-5. In fp16 and bf16 the medians are at most 0.008
and 0.05, but single rows of a mixture of experts at 0.3: if two experts are nearly equal, rounding decides. A step that omits
something that the module does is at 1.
"""

_PROMPTS: Final = 3
"""A model is refused if it fails with all of these prompts: even in fp32 an expert may change by chance, but not repeatedly."""

_WATCHED_NAME: Final = "attnstore_paged_watched"
MANY_ROWS: Final = 96
"""More rows per KV head (query tokens times GQA group) than any backend's kernel for few rows takes."""

_SECOND_CHUNK_TOKENS: Final = 11
_DECODED_TOKENS: Final = 3
_TOKEN_STRIDE: Final = 7919
"""A prime, so that the prompt's tokens are spread over any vocabulary."""

_STALE: Final = 100.0
"""The content of memory before it is written, so that reading a key too early is detected."""

_FAR: Final = 20
"""Masks are queried for positions up to `2 ** _FAR`."""

_COUNTING_FIELDS: Final = ("attn_temperature_tuning",)
"""Fields of a config that make attention count the tokens of a call instead of using their positions (Llama 4). The effect appears
only after thousands of tokens.
"""


class AttentionKind(NamedTuple):
    """What a layer requests of attention besides its tensors; see `AttentionBackend.paged_attention`."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: bool

    def extras(self) -> list[str]:
        """The names of the requested features other than a scale."""
        return [name for name, asked in self._asdict().items() if name != "scale" and asked]


@dataclass(frozen=True, slots=True, kw_only=True)
class _WatchedStep(PagedStep):
    """A step that records what its layers request. kinds: by the layer's number."""

    kinds: dict[int, AttentionKind]

    def attend_stored(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `PagedStep.attend_stored`."""
        self.kinds[layer] = AttentionKind(scale, sliding_window, soft_cap, sinks is not None)
        # By name, because a dataclass with slots is another class than the one that `super` would look for.
        return PagedStep.attend_stored(
            self, layer, query, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks
        )


class SelfTest:
    """Tests a module on `device` that no decoder has taken over yet, for pages of `layout` and prompts of up to `context_tokens`,
    with the backend `attention`. `name` is the model's name in messages.

    Raises `ModelUnavailable` if the module cannot compute by itself.
    """

    def __init__(
        self, module: Any, layout: PageLayout, context_tokens: int, name: str, attention: AttentionBackend, device: Device
    ) -> None:
        self._module, self._layout, self._name = module, layout, name
        self._attention, self._device, self._place = attention, device, module.device
        if counting := [name for name in _COUNTING_FIELDS if getattr(module.config, name, None)]:
            raise ModelUnavailable(f"{self._name} has {', '.join(counting)}, which is not implemented")
        # First more rows than the kernel for few rows takes, then few rows, then single ones.
        group = module.config.num_attention_heads // layout.kv_heads
        many = MANY_ROWS // max(group, 1) + 1
        prefilled = [min(end, context_tokens) for end in (0, many, many + _SECOND_CHUNK_TOKENS)]
        tokens = min(prefilled[-1] + _DECODED_TOKENS, context_tokens)
        self._chunks = [*pairwise(prefilled), *((token, token + 1) for token in range(prefilled[-1], tokens))]
        self._parts = [slice(begin, end) for begin, end in pairwise((*prefilled, tokens)) if begin < end]
        numbers = torch.arange(1, _PROMPTS * tokens + 1, device=self._place).view(_PROMPTS, tokens)
        self._prompts = numbers * _TOKEN_STRIDE % module.config.vocab_size
        self._expected = self._own_logits(self._prompts[0])

    def run(self, decoder: Decoder) -> frozenset[AttentionKind]:
        """Compares `decoder`, on pages and in chunks, with the module.

        Returns what the layers request of attention. Raises `ModelUnavailable` if pages do not support that, or if logits differ.
        """
        _register_watched()
        kinds: dict[int, AttentionKind] = {}
        distances: list[float] = []
        tolerance = TOLERANCE[TORCH_DTYPES[self._layout.dtype]]
        for prompt in self._prompts:
            expected = self._own_logits(prompt) if distances else self._expected
            with self._refusing("cannot run on pages"), _attention(self._module, _WATCHED_NAME):
                logits = self._paged_logits(decoder, prompt, kinds)
            if kinds.keys() != set(range(self._layout.layers)):
                raise ModelUnavailable(f"{self._name} has layers that keep no keys and values of their own")
            distances.append(self._distance(logits, expected, tolerance.quantile))
            if distances[-1] <= tolerance.distance:
                return frozenset(kinds.values())
        raise ModelUnavailable(f"{self._name} on pages has other logits than by itself, at a distance of {min(distances):.2g}")

    def _own_logits(self, prompt: Tensor) -> Tensor:
        with self._refusing("cannot run by itself"), _attention(self._module, "eager"), torch.inference_mode():
            logits: Tensor = self._module(input_ids=prompt[None], use_cache=False).logits[0].float()
        if logits.isnan().any() or not logits.isfinite().any(dim=-1).all():
            raise ModelUnavailable(f"{self._name} has logits in {self._layout.dtype.value} that are no numbers")
        return logits

    def _paged_logits(self, decoder: Decoder, prompt: Tensor, kinds: dict[int, AttentionKind]) -> Tensor:
        layout = self._layout
        blocks = -(-len(prompt) // layout.block_tokens)
        table = torch.arange(blocks, device=self._place).flip(0)
        shape = (blocks, layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        pool = torch.full(shape, _STALE, dtype=TORCH_DTYPES[layout.dtype], device=self._place)
        logits = []
        for begin, end in self._chunks:
            positions = torch.arange(begin, end, device=self._place)
            step = _WatchedStep(
                backend=self._attention,
                pool=pool,
                slot_blocks=table[positions // layout.block_tokens],
                slot_offsets=positions % layout.block_tokens,
                block_tables=table[None].int(),
                context_lens=torch.tensor([end], dtype=torch.int32, device=self._place),
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=self._place),
                before_layer=at_once,
                kinds=kinds,
            )
            logits.append(decoder.logits(prompt[begin:end], positions, positions - begin, step))
        return torch.cat(logits)

    def _distance(self, logits: Tensor, expected: Tensor, quantile: float) -> float:
        """Returns the distance of the part of the prompt where it is largest; infinite if logits are finite that should not be, or
        the reverse.
        """
        finite = expected.isfinite()
        if logits.shape != finite.shape or not torch.equal(logits.isfinite(), finite):
            return math.inf
        expected = expected.where(finite, 0.0)
        distances = (logits.where(finite, 0.0) - expected).norm(dim=-1) / expected.norm(dim=-1)
        distances = distances.nan_to_num(nan=0.0, posinf=math.inf)  # NaN is 0 / 0
        return max(float(distances[part].quantile(quantile)) for part in self._parts)

    @contextmanager
    def _refusing(self, why: str) -> Iterator[None]:
        try:
            with self._device.submitting():
                yield
        except (OutOfDeviceMemory, DeviceLost):
            raise
        except ModelUnavailable as error:
            raise ModelUnavailable(f"{self._name} {why}: {error}") from error
        except Exception as error:  # a model's code fails in as many ways as there are models
            raise ModelUnavailable(f"{self._name} {why} ({type(error).__name__}: {' '.join(str(error).split())})") from error


@contextmanager
def _attention(module: Any, name: str) -> Iterator[None]:
    module.set_attn_implementation(name)
    try:
        yield
    finally:
        module.set_attn_implementation(ATTENTION_NAME)


class _MaskRule(NamedTuple):
    """Which keys a query sees. sees: of `batch, head, query, key` as index tensors, as transformers builds its masks."""

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def is_window(self, sliding_window: int | None) -> bool:
        """Returns whether a query at `p` sees exactly the keys in `(p - sliding_window, p]`, or in `[0, p]` if it is None."""
        powers = 2 ** torch.arange(_FAR + 1)
        positions = torch.cat((powers - 1, powers))
        window = positions.max() + 1 if sliding_window is None else sliding_window
        positions = torch.cat((positions, positions - window, positions - window + 1)).clamp(min=0)
        query, key = positions[:, None], positions[None, :]
        zero = torch.zeros((), dtype=torch.int64)
        seen = torch.as_tensor(self.sees(zero, zero, query, key)).expand(len(positions), len(positions))
        return torch.equal(seen, (key <= query) & (key > query - window))


def _register_watched() -> None:
    AttentionInterface.register(_WATCHED_NAME, _watched_forward)
    AttentionMaskInterface.register(_WATCHED_NAME, _mask_rule)


def _mask_rule(*, mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], **_: Any) -> _MaskRule:
    return _MaskRule(mask_function)


def _watched_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | _MaskRule | None, **arguments: Any
) -> tuple[Tensor, None]:
    """`paged_attention_forward`, after checking that the mask and the shapes of a layer fit pages."""
    name, paged = type(module).__name__, arguments.get("paged")
    if isinstance(attention_mask, _MaskRule):
        if not attention_mask.is_window(arguments.get("sliding_window")):
            raise ModelUnavailable(f"{name} attends through a mask that is not its sliding window")
        attention_mask = None
    if paged is not None and not key.shape[1::2] == value.shape[1::2] == (paged.pool.shape[3], paged.pool.shape[5]):
        raise ModelUnavailable(f"{name} has keys {tuple(key.shape[1::2])} and values {tuple(value.shape[1::2])}: heads, head_dim")
    return paged_attention_forward(module, query, key, value, attention_mask, **arguments)
