"""Long-context tasks with scores: definitions follow RULER, texts are made here, for any tokenizer.

Source: RULER, arXiv:2404.06654.
"""

from __future__ import annotations

from collections.abc import Callable

from xkv.evaluation.tasks import (
    common_words,
    frequent_words,
    key_value,
    multikey,
    multiquery,
    multiturn,
    multivalue,
    needle,
    perplexity,
    qa,
    single,
    variables,
)
from xkv.evaluation.tasks.sample import Count, Question, Sample

MakeSample = Callable[[int, int, Count], Sample]
"""``make(seed, n_tokens, count)``: the same arguments give the same sample."""

TASKS: dict[str, MakeSample] = {
    "single": single.make,
    "needle": needle.make,
    "multikey": multikey.make,
    "multivalue": multivalue.make,
    "multiquery": multiquery.make,
    "variables": variables.make,
    "qa": qa.make,
    "key_value": key_value.make,
    "common_words": common_words.make,
    "frequent_words": frequent_words.make,
    "multiturn": multiturn.make,
    perplexity.PERPLEXITY: perplexity.make,
}

__all__ = ["TASKS", "Count", "MakeSample", "Question", "Sample"]
