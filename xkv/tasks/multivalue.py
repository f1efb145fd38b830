"""Many values: several numbers of one name are hidden, and all of them are asked for."""

from __future__ import annotations

from random import Random

from xkv.tasks import needle
from xkv.tasks.haystack import draw_names, draw_number, hide
from xkv.tasks.sample import Count, Question, Sample

N_NAMES = 4
N_VALUES = 4


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Four names with four numbers each, or fewer names in a short text; each name is asked for.

    Source: RULER's niah_multivalue, arXiv:2404.06654.
    """
    random = Random(f"multivalue {seed} {n_tokens}")
    names = draw_names(random, max(1, min(N_NAMES, n_tokens // 128)))
    numbers = {name: [draw_number(random) for _ in range(N_VALUES)] for name in names}
    sentences = [needle.state("number", name, x) for name in names for x in numbers[name]]
    random.shuffle(sentences)
    context = hide(random, sentences, n_tokens, count, needle.INTRO)
    questions = [
        Question(
            f"What are all the magic numbers of {name}?",
            f"All the magic numbers of {name}:",
            f"{f', {name}: '.join(numbers[name])}.",
            tuple(numbers[name]),
        )
        for name in names
    ]
    return Sample("multivalue", seed, context, tuple(questions))
