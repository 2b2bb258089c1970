"""vLLM's side. Runs under the interpreter of `--vllm-python`, where vLLM is installed and AttnStore is not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from vllm import LLM, SamplingParams

from experiments.throughput.side import Start, serve

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmGenerator:
    """vLLM's offline engine with its defaults, stepped in this process. Its prefix cache is off, because no prompt here could use
    it.
    """

    def __init__(self, start: Start) -> None:
        llm = LLM(start.model, dtype=_DTYPES[start.dtype], max_model_len=start.tokens_max, enable_prefix_caching=False)
        self._engine = llm.llm_engine
        self._names = map(str, count())
        self._continued: dict[str, int] = {}

    def submit(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """See `Generator.submit`."""
        how = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._continued.clear()
        for prompt in prompts:
            name = next(self._names)
            self._continued[name] = 0
            self._engine.add_request(name, {"prompt_token_ids": prompt}, how)

    def step(self) -> Sequence[int]:
        """See `Generator.step`."""
        for output in self._engine.step():
            self._continued[output.request_id] = len(output.outputs[0].token_ids)
        return list(self._continued.values())


if __name__ == "__main__":
    serve(VllmGenerator)
