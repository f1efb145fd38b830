"""Where messages begin in a prompt, by the tokens that a chat template begins them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

_USER, _ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}


def message_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that a user's message, and the answer to it, begin with; maybe others' too.

    They say where it is worth to be able to go back to, no more: one that is in a text as well, or
    that a template is not asked for, costs a few tokens of prefill.
    """
    if not tokenizer.has_chat_template:
        return frozenset()

    def tokens(messages: Sequence[Any], is_asking: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=is_asking)

    try:
        asked = tokens([_USER])
        turns = [
            (asked, tokens([_USER], is_asking=True)),
            (tokens([_USER, _ASSISTANT]), tokens([_USER, _ASSISTANT, _USER])),
        ]
    except TemplateError:
        return frozenset()
    return frozenset(
        longer[len(shorter)]
        for shorter, longer in turns
        if longer[: len(shorter)] == shorter != longer
    )
