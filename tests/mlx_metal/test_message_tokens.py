"""Where messages begin, by a chat template."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from transformers import PreTrainedTokenizerFast

from xkv.backends.mlx_metal.server.message_tokens import message_tokens
from xkv.tiny import CHECKPOINT_DIR

_CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


class Tokenizer:
    """One token a character, but for ``<s>`` and ``</s>``."""

    def __init__(self, template: str | None) -> None:
        self.has_chat_template = template is not None
        self._plain = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT_DIR / "tokenizer.json"))
        self._plain.chat_template = template

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        text = self._plain.apply_chat_template(messages, tokenize=False, **options)
        return [ord(x) for x in text.replace("</s>", "\2").replace("<s>", "\1")]


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        (_CHATML, "\1"),
        (_CHATML.replace("<s>assistant", "<s>"), "\1"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "["),
        # an answer's end that is there only before another message
        ("{% for m in messages %}{% if not loop.first %}|{% endif %}{{ m.role }}{% endfor %}", "|"),
        ("{{ messages | length }}{% if add_generation_prompt %}!{% endif %}", "!"),
        ("{{ messages | length }}", ""),
        ("{{ raise_exception('not this way') }}", ""),
        (None, ""),
    ],
)
def test_first_tokens_of_messages(template: str | None, tokens: str) -> None:
    assert message_tokens(Tokenizer(template)) == frozenset(map(ord, tokens))


def test_of_the_bundled_model() -> None:
    tokenizer = load_tokenizer(CHECKPOINT_DIR)
    found = tokenizer.convert_ids_to_tokens(sorted(message_tokens(tokenizer)))
    assert found == ["<|user|>", "<|assistant|>"]
