"""The byte layout of a page, shared by all tiers.

Owns: `DType`, `PageLayout` and the sizes derived from it.
Invariant: a page is `[layer][K|V][kv_head][token][dim]`, contiguous, so a layer range of a page is one contiguous slice.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

from attnstore.errors import InvalidArgument
from attnstore.limits import LATENT_DIM_MAX, LATENT_DIM_STEP, PAGE_BYTES_MAX

_FIELD_MAX = 1 << 20
_CANONICAL = struct.Struct("<7I")


class DType(enum.Enum):
    """Element type of a page. The value is the name used in the wire's documentation and in JSON."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    OPAQUE = "opaque"

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self]

    @property
    def code(self) -> int:
        """The number of this dtype on the wire and in the canonical encoding (1..4)."""
        return _CODES[self]

    @classmethod
    def from_code(cls, code: int) -> DType:
        """The inverse of `code`. Raises `InvalidArgument` for an unknown number."""
        for dtype, known in _CODES.items():
            if known == code:
                return dtype
        raise InvalidArgument(f"dtype code {code} is unknown; known codes are 1 (bf16), 2 (fp16), 3 (fp32), 4 (opaque)")


_ITEM_BYTES = {DType.BF16: 2, DType.FP16: 2, DType.FP32: 4, DType.OPAQUE: 1}
_CODES = {DType.BF16: 1, DType.FP16: 2, DType.FP32: 3, DType.OPAQUE: 4}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Shape of one page (one block of tokens, all layers of one tensor-parallel rank).

    Raises `InvalidArgument` if a field is out of range or the page would be larger than `limits.PAGE_BYTES_MAX`.

    >>> PageLayout(layers=30, kv_heads=3, head_dim=64, dtype=DType.BF16).page_bytes
    368640
    """

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int = 16
    dtype: DType = DType.BF16
    tp_rank: int = 0
    tp_size: int = 1
    layer_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one layer's K and V of one block."""
    page_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one page."""

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "tp_size"):
            value = getattr(self, name)
            if not 1 <= value <= _FIELD_MAX:
                raise InvalidArgument(f"layout.{name} is {value}; it must be between 1 and {_FIELD_MAX}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise InvalidArgument(f"layout.tp_rank is {self.tp_rank}; it must be at least 0 and less than tp_size = {self.tp_size}")
        layer_bytes = 2 * self.kv_heads * self.block_tokens * self.head_dim * self.dtype.item_bytes
        # Computed once, because they are needed for every page.
        object.__setattr__(self, "layer_bytes", layer_bytes)
        object.__setattr__(self, "page_bytes", self.layers * layer_bytes)
        if self.page_bytes > PAGE_BYTES_MAX:
            raise InvalidArgument(
                f"a page of this layout has {self.page_bytes} bytes; the maximum is {PAGE_BYTES_MAX}; use fewer block_tokens"
            )

    @classmethod
    def of_latents(cls, layers: int, row_dim: int, block_tokens: int = 16, dtype: DType = DType.BF16) -> PageLayout:
        """Returns the layout of pages of latent rows (MLA), `[layer][token][row_dim]`: one row for each token and layer, which all
        heads share. A row counts as the K and V of one head, each half as long, so that every node can keep such pages.

        Raises `InvalidArgument` for an odd `row_dim`, or as the constructor.

        >>> PageLayout.of_latents(layers=61, row_dim=512 + 64).layer_bytes // 16
        1152
        """
        if row_dim % 2:
            raise InvalidArgument(f"a latent row has {row_dim} elements; their number must be even")
        return cls(layers, 1, row_dim // 2, block_tokens, dtype)

    @property
    def row_dim(self) -> int:
        """Elements of a latent row, if the page has latents."""
        return 2 * self.head_dim

    def query_dim(self, value_dim: int) -> int:
        """Elements of a query row for each head: of a latent row if `value_dim` is not 0, see `check_latents`."""
        return self.row_dim if value_dim else self.head_dim

    def check_latents(self, value_dim: int) -> None:
        """Raises `InvalidArgument` unless the pages may hold latent rows that nodes attend to, whose first `value_dim` elements are
        values.
        """
        if self.kv_heads != 1:
            raise InvalidArgument(f"the layout has {self.kv_heads} kv_heads; pages of latents have one, see PageLayout.of_latents")
        for name, value, most in (("row_dim", self.row_dim, LATENT_DIM_MAX), ("value_dim", value_dim, self.row_dim)):
            if not 1 <= value <= most or value % LATENT_DIM_STEP:
                raise InvalidArgument(f"{name} is {value}; it must be a multiple of {LATENT_DIM_STEP}, at most {most}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`(layers, 2, kv_heads, block_tokens, head_dim)`: the page as an array of elements."""
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    def layer_slice(self, layer_begin: int, layer_end: int) -> tuple[int, int]:
        """Returns the byte range `(begin, end)` of layers `[layer_begin, layer_end)` in a page; `layer_end == 0` means all layers.

        Raises `InvalidArgument` for an empty or out-of-range layer range.
        """
        end = layer_end or self.layers
        if not 0 <= layer_begin < end <= self.layers:
            raise InvalidArgument(f"layer range [{layer_begin}, {layer_end}) is not inside the layout's {self.layers} layers")
        return layer_begin * self.layer_bytes, end * self.layer_bytes

    def canonical(self) -> bytes:
        """Returns 28 bytes, little-endian u32 each: layers, kv_heads, head_dim, block_tokens, dtype code, tp_rank, tp_size."""
        return _CANONICAL.pack(
            self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.dtype.code, self.tp_rank, self.tp_size
        )
