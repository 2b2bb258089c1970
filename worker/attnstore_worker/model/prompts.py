"""From a text or a conversation to the tokens of a prompt.

Owns: both ways there. Invariant: a text gets the special tokens that the tokenizer adds, a conversation those that its chat
template writes and no other: its tokens are those of `apply_chat_template(tokenize=True)`. Most tokenizers add a BOS of their own,
so a rendered template must never be tokenized as a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from attnstore.errors import InvalidArgument

_CALLS: Final = ("tool_calls", "function_call")


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text to continue."""
    token_ids: list[int] = tokenizer(text, verbose=False).input_ids
    return token_ids


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens of a conversation that the assistant is to answer. A field of a message that is None is as good as absent.

    Raises `InvalidArgument` for a model without a chat template, and for what its template refuses or would leave out.
    """
    try:
        template = tokenizer.get_chat_template()
        token_ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except Exception as error:  # a template is a program of the model's: it may raise anything over a conversation
        raise InvalidArgument(f"the model's chat template refuses the conversation: {_in_one_line(error)}") from None
    for field in _CALLS:
        if field not in template and any(message.get(field) for message in messages):
            raise InvalidArgument(f"the model's chat template does not read {field}")
    return token_ids


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
