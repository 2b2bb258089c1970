"""The tokens of a prompt, from a text or a conversation.

Owns: both conversions. Invariant: a text gets the special tokens that the tokenizer adds, a conversation only those that its chat
template writes: its tokens are those of `apply_chat_template(tokenize=True)`. Most tokenizers add a BOS of their own, so a rendered
template must never be tokenized as a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from attnstore.errors import InvalidArgument

_CALLS: Final = ("tool_calls", "function_call")


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text to continue."""
    token_ids: list[int] = tokenizer(text, verbose=False).input_ids
    return token_ids


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the tokens of a conversation for the assistant to answer. A field of a message that is None counts as absent.

    Raises `InvalidArgument` for a model without a chat template, and for messages that its template refuses or would leave out.
    """
    try:
        template = tokenizer.get_chat_template()
        token_ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # a template is a program that comes with the model: it may raise any error
        raise InvalidArgument(f"the model's chat template refuses the conversation: {_in_one_line(error)}") from None
    for field in _CALLS:
        if field not in template and any(message.get(field) for message in messages):
            raise InvalidArgument(f"the model's chat template does not read {field}")
    return token_ids


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
