"""Variable tracking: a value is copied from variable to variable; which of them hold it?"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from xkv.evaluation.tasks.haystack import hide
from xkv.evaluation.tasks.sample import Count, Question, Sample
from xkv.tiny.words import NOUNS

N_CHAINS = 4
N_HOPS = 4
INTRO = "Values are copied from left to right: 12345 -> lamps means that lamps holds 12345."


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Four chains of four hops, or fewer chains in a short text; each chain is asked for.

    Source: RULER's variable tracking, arXiv:2404.06654.
    """
    random = Random(f"variables {seed} {n_tokens}")
    n_chains = max(1, min(N_CHAINS, n_tokens // 128))
    nouns = random.sample([noun for noun in NOUNS if noun != "lamps"], n_chains * (N_HOPS + 1))
    values = random.sample(range(10000, 100000), n_chains)
    chains = [
        [str(value), *nouns[i * (N_HOPS + 1) : (i + 1) * (N_HOPS + 1)]]
        for i, value in enumerate(values)
    ]
    # a random merge: the order inside a chain stays
    turns = [chain for chain in chains for _ in range(N_HOPS + 1)]
    random.shuffle(turns)
    links = {chain[0]: pairwise(chain) for chain in chains}
    sentences = ["{} -> {}.".format(*next(links[chain[0]])) for chain in turns]
    context = hide(random, sentences, n_tokens, count, INTRO)
    questions = [
        Question(
            f"Which variables does {value} reach?",
            f"{value} ->",
            f"{' -> '.join(variables)}.",
            tuple(variables),
        )
        for value, *variables in chains
    ]
    return Sample("variables", seed, context, tuple(questions))
