"""Linear layers whose weights are stored as this machine's matrix kernels read them fastest.

Owns: `PackedLinear`, `WidenedLinear`, `pack_linears`, `merged_linear`, `gated_product`. Invariant: results equal those of
`nn.Linear` up to rounding. torch stores a bf16 weight row by row and oneDNN reorders it at every call, which takes a third of a
layer's time, at one row as at 256; on a CPU without bf16 kernels torch's own loop takes eight times as long as fp32
(docs/decisions/0017-lean-decoder.md). fp32 gains nothing, so fp32 weights are not packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class PackedLinear(nn.Module):
    """`nn.Linear` on a CPU with a packed bf16 weight. The given weight is copied, not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes, because a packed weight has no layout that a state dictionary could store.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T + bias`."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return result

    def silu(self, rows: Tensor) -> Tensor:
        """`silu(forward(rows))` in one pass."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "swish", [1.0], "")
        return result

    def times(self, rows: Tensor, factor: Tensor) -> Tensor:
        """`forward(rows) * factor` in one pass."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, factor, self._packed, self._bias, "mul")
        return result


class WidenedLinear(nn.Module):
    """`nn.Linear` on a CPU without bf16 kernels: bf16 in and out, with an fp32 copy of the weight. Twice the memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = weight.detach().float()
        self._bias = None if bias is None else bias.detach().float()

    def forward(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T + bias`, rounded once."""
        return functional.linear(rows.float(), self._weight, self._bias).to(rows.dtype)


def has_bf16_kernels() -> bool:
    """Returns whether oneDNN has bf16 matrix kernels for this CPU (AVX-512 or AMX)."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed(weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Returns the layer that this machine runs faster than `nn.Linear`, or None."""
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu":
        return None
    return PackedLinear(weight, bias) if has_bf16_kernels() else WidenedLinear(weight, bias)


def pack_linears(module: nn.Module) -> None:
    """Replaces every `nn.Linear` below `module` whose weight can be packed. Its unpacked weight is freed, unless it is tied."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (packed := _packed(child.weight, child.bias)) is not None:
                setattr(parent, name, packed)


def merged_linear(weight: Tensor, linears: Sequence[nn.Linear]) -> nn.Module:
    """Returns one layer that computes the outputs of several side by side; their weights are the parts of `weight`. Packed if
    possible.
    """
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    bias = torch.cat(biases) if biases else None
    if (packed := _packed(weight, bias)) is not None:
        return packed
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged.eval()


def gated_product(gate: nn.Module, up: nn.Module, rows: Tensor) -> Tensor:
    """Returns `silu(gate(rows)) * up(rows)`, the inner part of a gated MLP (Shazeer 2020, SwiGLU)."""
    if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
        return up.times(rows, gate.silu(rows))
    product: Tensor = functional.silu(gate(rows)) * up(rows)
    return product
