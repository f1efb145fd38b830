"""Many values: several numbers of one name are hidden, and all of them are asked for."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks import needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, hide
from xkv.evaluation.tasks.sample import Count, Question, Sample

N_NAMES = 4
CONNECTIVES = (":", " is", " was", " =")
"""How the values of a name are stated, in the order of the answer: a text says a thing in several
ways, and a small model can keep them apart."""


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Four names with four numbers each, or fewer names in a short text; each name is asked for.

    Source: RULER's niah_multivalue, arXiv:2404.06654.
    """
    random = Random(f"multivalue {seed} {n_tokens}")
    names = draw_names(random, max(1, min(N_NAMES, n_tokens // 128)))
    numbers = {name: [draw_number(random) for _ in CONNECTIVES] for name in names}
    sentences = [
        f"Magic number of {name}{word} {number}."
        for name in names
        for word, number in zip(CONNECTIVES, numbers[name], strict=True)
    ]
    random.shuffle(sentences)
    context = hide(random, sentences, n_tokens, count, needle.INTRO)
    questions = []
    for name in names:
        stated = [f"{name}{word} {x}" for word, x in zip(CONNECTIVES, numbers[name], strict=True)]
        prefix = f"All the magic numbers of {name}{CONNECTIVES[0]}"
        answer = f"{', '.join(stated)}.".removeprefix(f"{name}{CONNECTIVES[0]} ")
        question = f"What are all the magic numbers of {name}?"
        questions.append(Question(question, prefix, answer, tuple(numbers[name])))
    return Sample("multivalue", seed, context, tuple(questions))
