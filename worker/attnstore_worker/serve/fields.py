"""The fields of a request that are not served, and their values that are accepted nevertheless.

Owns: the names that OpenAI's and vLLM's requests have and this endpoint does not implement. Invariant: no field that could change
the answer is ignored. A field of `UNSERVED` is refused by name unless its value requests nothing; a field of `WITHOUT_EFFECT`
cannot change the answer, whatever its value; an unknown field is refused, because ignoring a misspelt field would give a wrong
answer (docs/decisions/0062-fields-that-are-refused.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Neutral = Mapping[str, tuple[object, ...]]
"""Fields with the values that request nothing; null is always one of them."""

WITHOUT_EFFECT: Final = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "session_id"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)

UNSERVED: Final[Neutral] = {
    # sampling
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "best_of": (1,),
    # end of the answer
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "repetition_detection": (),
    "thinking_token_budget": (),
    # form of the answer
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "moderation": (),
    "web_search_options": (),
    # additional output
    "echo": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_assistant_tokens_mask": (False,),
    "routed_experts_prompt_start": (0,),
    "stream_interval": (1,),
    # tools: without any, there is nothing to choose or to call in parallel
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    # input of the prompt
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "documents": ([],),
    # between servers
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
}
"""In both kinds of request."""

COMPLETION_UNSERVED: Final[Neutral] = {
    **UNSERVED,
    "add_special_tokens": (True,),
    "logprobs": (),
    "suffix": ("",),
}

CHAT_UNSERVED: Final[Neutral] = {
    **UNSERVED,
    "add_special_tokens": (False,),
    "logprobs": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}


def asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Returns whether a field's value is one of those. Numbers and booleans differ: 0 is not False."""
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)
