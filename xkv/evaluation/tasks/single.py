"""Single number: one name's number is hidden in a text, and nothing like it: the easiest task."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks import needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, hide
from xkv.evaluation.tasks.sample import Count, Sample


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """One fact, one question.

    Source: RULER's niah_single_1, arXiv:2404.06654.
    """
    random = Random(f"single {seed} {n_tokens}")
    fact = "number", *draw_names(random, 1), draw_number(random)
    context = hide(random, [needle.state(*fact)], n_tokens, count, needle.INTRO)
    return Sample("single", seed, context, (needle.ask(*fact),))
