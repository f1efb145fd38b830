"""A single needle: one word, one number and one UUID hidden in a text, each asked for alone."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks.haystack import draw_names, draw_number, draw_uuid, draw_words, hide
from xkv.evaluation.tasks.sample import Count, Question, Sample

INTRO = "Some magic words, numbers and codes are hidden in the text. Remember them."
_DRAW = {"word": draw_words, "number": draw_number, "code": draw_uuid}


def state(kind: str, name: str, value: str) -> str:
    """The sentence that hides a value."""
    return f"Magic {kind} of {name}: {value}."


def ask(kind: str, name: str, value: str) -> Question:
    """The question for one value."""
    question = f"What is the magic {kind} of {name}?"
    return Question(question, f"Magic {kind} of {name}:", f"{value}.", (value,))


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """One needle of each kind.

    Source: RULER's niah_single, arXiv:2404.06654.
    """
    random = Random(f"needle {seed} {n_tokens}")
    kinds = random.sample(sorted(_DRAW), len(_DRAW))
    facts = [
        (kind, name, _DRAW[kind](random))
        for kind, name in zip(kinds, draw_names(random, len(kinds)), strict=True)
    ]
    context = hide(random, [state(*fact) for fact in facts], n_tokens, count, INTRO)
    return Sample("needle", seed, context, tuple(ask(*fact) for fact in facts))
