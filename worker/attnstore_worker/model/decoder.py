"""The interface that runs a step of packed tokens through a model, whatever its modules are.

Owns: the contract `Decoder`; `TransformersDecoder`, which runs any Llama-type model through transformers' modules; the choice
between implementations, and of the attention beside them. Invariant: each sequence attends to its own pages only, and its logits do
not depend on its neighbours, up to rounding.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from attnstore.attention import AttentionBackend, create_attention
from attnstore_worker.device.base import Device
from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.linear import pack_linears


class Decoder(Protocol):
    """A causal language model over paged KV memory. `capturable`: a CUDA graph may capture a step without `remote` and with
    `at_once`, because nothing is read back from the device.
    """

    @property
    def capturable(self) -> bool: ...

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """Computes packed tokens, int64 `[total_q]` at int64 `positions`; stores their keys and values into the step's pool.

        Returns fp32 logits `[len(rows), vocabulary]` of the tokens at `rows`, int64 indices into `token_ids`.
        """
        ...


class TransformersDecoder:
    """Runs a model whose attention implementation is `ATTENTION_NAME` through transformers.

    Takes over the module and packs its linear layers if possible; the module still runs by itself.
    """

    capturable: Final = False

    def __init__(self, module: Any) -> None:
        pack_linears(module)
        self._module = module

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """See `Decoder.logits`."""
        with torch.inference_mode():
            # The whole module, not its body and its head, because some models scale or cap the logits between and after them.
            output = self._module(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows, paged=step
            )
            logits: Tensor = output.logits[0]
            return logits.float()


def create_decoder(module: Any, device: Device) -> Decoder:
    """Returns the fastest decoder that computes the same as transformers' `module`, which it takes over, on `device`, where the
    module's weights are.
    """
    if not _is_plain_llama(module):
        return TransformersDecoder(module)
    # The decoders are imported when they are created: one needs Triton, the other numba.
    if device.uses_triton:
        from attnstore_worker.model.llama_device import DeviceLlamaDecoder

        return DeviceLlamaDecoder(module)
    from attnstore_worker.model.llama import LlamaDecoder, fits

    return LlamaDecoder(module) if fits(module) else TransformersDecoder(module)


def attention_on(device: Device) -> AttentionBackend:
    """Returns the attention of a device. Raises `InvalidArgument` if a package of it is missing."""
    return create_attention("triton" if device.uses_triton else "cpu")


def _is_plain_llama(module: Any) -> bool:
    """Returns whether a module is exactly Llama, with its usual activation."""
    return type(module) is LlamaForCausalLM and module.config.hidden_act == "silu"
