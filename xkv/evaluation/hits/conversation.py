"""A conversation over a document, what may happen to it, and what is asked in the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from xkv.evaluation.tasks import needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, draw_words, hide
from xkv.evaluation.tasks.sample import Count, Question

N_LATER, LATER_TOKENS = 3, 170
"""Messages that fill the tail, each more than a fold takes."""
EDITED_TOKENS = 150

_DECODER = json.JSONDecoder()

Exchange = tuple[str, str]
"""A message and the reply to it."""


@dataclass(frozen=True)
class ToolCall(Question):
    """A call of a tool in JSON of which the model is given all but its last argument.

    Args:
        closing: What a server that holds a model to the tool's grammar writes behind the argument;
            empty where the model has to close the call itself.
    """

    closing: str = ""

    def score(self, prediction: str) -> float:
        """1 if the call is one valid JSON object, and the right one."""
        said = prediction
        try:
            if self.closing:
                value, _ = _DECODER.raw_decode(prediction.lstrip())
                said = json.dumps(value) + self.closing
            call, _ = _DECODER.raw_decode(self.prefix + said)
        except ValueError:
            return 0.0
        return float(call == json.loads(self.prefix + self.answer))


@dataclass(frozen=True)
class Talk:
    """A conversation.

    Args:
        seed: Seed it was drawn with.
        context: The document, which is compressed.
        opening: What was said before anything happens to the cache.
        edited: Said next, and then taken back.
        later: Said next, and kept.
        questions: What is asked in the end, each alone, by task.
    """

    seed: int
    context: str
    opening: tuple[Exchange, ...]
    edited: Exchange
    later: tuple[Exchange, ...]
    questions: dict[str, Question]


def make(seed: int, n_tokens: int, count: Count) -> Talk:
    """Draw a conversation over a document that states one number.

    ``needle`` asks for it, ``recall`` for a word that an earlier reply said. ``tool_call`` is given
    a call up to the value of its argument, the number again; it has to write that and close the
    call. Small models do no more, and the bundled one, which has seen no JSON, does not close it
    either: ``tool_value`` is the same answer with the call closed for it.

    The message that is taken back says otherwise of all that is asked.
    """
    random = Random(f"hits {seed} {n_tokens}")
    name, speaker = draw_names(random, 2)
    fact, wrong = (("number", name, draw_number(random)) for _ in range(2))
    said, unsaid = (("word", speaker, draw_words(random)) for _ in range(2))
    context = hide(random, [needle.state(*fact)], n_tokens, count, needle.INTRO)
    text = hide(random, [needle.state(*x) for x in (wrong, unsaid)], EDITED_TOKENS, count)
    later = tuple((hide(random, [], LATER_TOKENS, count), "Noted.") for _ in range(N_LATER))
    recall = needle.ask(*said)
    return Talk(
        seed,
        context,
        ((recall.text, needle.state(*said)),),
        (f"{text}\n\n{recall.text}", needle.state(*unsaid)),
        later,
        {
            "needle": needle.ask(*fact),
            "tool_call": _tool_call(*fact),
            "tool_value": _tool_call(*fact, closing="}}"),
            "recall": recall,
        },
    )


TASKS = "needle", "tool_call", "tool_value", "recall"


def _tool_call(kind: str, name: str, value: str, closing: str = "") -> ToolCall:
    question = needle.ask(kind, name, value)
    about = question.prefix.rstrip(":")
    prefix = f'{{"name": "note", "arguments": {{"{about}":'
    return ToolCall(question.text, prefix, f" {value}}}}}", (value,), closing=closing)
