"""Linear layers whose weights lie in the order in which oneDNN's matrix kernels read them.

Owns: `PackedLinear`, `pack_linears`, `merged_linear`, `gated_product`. Invariant: results are `nn.Linear`'s up to rounding.
Why: torch keeps a weight row by row and oneDNN reorders it at every call, which is a third of a bf16 layer's time, at one row as at
256 (docs/decisions/0017-lean-decoder.md). In fp32 nothing is gained, so nothing is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_PACKED_DTYPE = torch.bfloat16


class PackedLinear(nn.Module):
    """`nn.Linear` on a CPU with a packed bf16 weight. The weight given is copied, not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes: a packed weight has no layout that a state dictionary could hold.
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


def packable(weight: Tensor) -> bool:
    """oneDNN on this machine has kernels for such a weight."""
    return (
        weight.dtype is _PACKED_DTYPE
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_linears(module: nn.Module) -> None:
    """Replaces every `nn.Linear` below `module` whose weight can be packed. The rows' own copy is freed, unless it is tied."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and packable(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))


def merged_linear(linears: Sequence[nn.Linear]) -> nn.Module:
    """One layer that gives the outputs of several side by side; they have one input. Packed where that is possible.

    The others become views of the merged weight, so that it is held once where it is not packed.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    bias = torch.cat(biases) if biases else None
    if packable(weight):
        return PackedLinear(weight, bias)
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged.eval()


def gated_product(gate: nn.Module, up: nn.Module, rows: Tensor) -> Tensor:
    """`silu(gate(rows)) * up(rows)`, the inside of a gated MLP (Shazeer 2020, SwiGLU)."""
    if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
        return up.times(rows, gate.silu(rows))
    product: Tensor = functional.silu(gate(rows)) * up(rows)
    return product
