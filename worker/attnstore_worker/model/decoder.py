"""How a step of packed tokens goes through a model, whatever its modules are.

Owns: the contract `Decoder`; `TransformersDecoder`, which runs any Llama-type model through transformers' modules; the choice.
Invariant: each sequence attends to its own pages only, and its logits do not depend on its neighbours, up to rounding.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.linear import pack_linears
from attnstore_worker.model.llama import LlamaDecoder, is_plain_llama


class Decoder(Protocol):
    """A causal language model over paged KV memory."""

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """Computes packed tokens, int64 `[total_q]` at int64 `positions`; their keys and values go into the step's pool.

        Returns fp32 logits `[len(rows), vocabulary]` of the tokens at `rows`, int64 indices into `token_ids`.
        """
        ...


class TransformersDecoder:
    """A model whose attention implementation is `ATTENTION_NAME`, as transformers runs it.

    Takes over the module, whose linear layers are packed where that is possible; it still runs by itself.
    """

    def __init__(self, module: Any) -> None:
        pack_linears(module)
        self._module = module

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """See `Decoder.logits`."""
        with torch.inference_mode():
            # The whole module, not its body and its head: some scale or cap the logits between and behind them.
            output = self._module(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows, paged=step
            )
            logits: Tensor = output.logits[0]
            return logits.float()


def create_decoder(module: Any) -> Decoder:
    """The leanest decoder that computes what transformers' `module` does; it takes the module over."""
    return LlamaDecoder(module) if is_plain_llama(module) else TransformersDecoder(module)
