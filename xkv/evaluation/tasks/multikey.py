"""Many keys: numbers of many names are hidden, and one name's is asked for."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks import needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, hide
from xkv.evaluation.tasks.sample import Count, Sample

TOKENS_PER_KEY = 64
MOST_KEYS = 16


def n_keys(n_tokens: int) -> int:
    """Names with a number in a text of this length: RULER's 4, and up to 16 in a long one."""
    return max(4, min(MOST_KEYS, n_tokens // TOKENS_PER_KEY))


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Every name is asked for, the others are its distractors.

    Source: RULER's niah_multikey_1, arXiv:2404.06654.
    """
    random = Random(f"multikey {seed} {n_tokens}")
    facts = [("number", x, draw_number(random)) for x in draw_names(random, n_keys(n_tokens))]
    sentences = [needle.state(*fact) for fact in facts]
    context = hide(random, sentences, n_tokens, count, needle.INTRO)
    return Sample("multikey", seed, context, tuple(needle.ask(*fact) for fact in facts))
