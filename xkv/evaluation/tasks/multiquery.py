"""Many queries: numbers of many names are hidden, and those of four names are asked for at once."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks import multikey, needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, hide
from xkv.evaluation.tasks.sample import Count, Question, Sample

N_QUERIES = 4


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Every name is in one question.

    Source: RULER's niah_multiquery, arXiv:2404.06654.
    """
    random = Random(f"multiquery {seed} {n_tokens}")
    n_names = multikey.n_keys(n_tokens) // N_QUERIES * N_QUERIES
    facts = [(name, draw_number(random)) for name in draw_names(random, n_names)]
    sentences = [needle.state("number", *fact) for fact in facts]
    context = hide(random, sentences, n_tokens, count, needle.INTRO)
    random.shuffle(facts)
    questions = []
    for start in range(0, n_names, N_QUERIES):
        names, numbers = zip(*facts[start : start + N_QUERIES], strict=True)
        pairs = [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
        answer = f"{', '.join(pairs)}."
        question = f"What are the magic numbers of {', '.join(names)}?"
        questions.append(Question(question, "Magic numbers of", answer, numbers))
    return Sample("multiquery", seed, context, tuple(questions))
