"""A conversation over a context: a question a round, later rounds bring facts of their own."""

from __future__ import annotations

from random import Random

from xkv.evaluation.tasks import multikey, needle
from xkv.evaluation.tasks.haystack import draw_names, draw_number, hide
from xkv.evaluation.tasks.sample import Count, Sample

N_ROUNDS = 5
FACTS_PER_ROUND = 2
ROUND_TOKENS = 60


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Five rounds; from the second on, every other one asks for a fact of an earlier message.

    Replies stay in the conversation, and what is asked was never stated in the same message.
    """
    random = Random(f"multiturn {seed} {n_tokens}")
    n_keys = max(N_ROUNDS, multikey.n_keys(n_tokens))
    names = draw_names(random, n_keys + FACTS_PER_ROUND * (N_ROUNDS - 1))
    facts = [("number", name, draw_number(random)) for name in names]
    first, later = facts[:n_keys], facts[n_keys:]
    sentences = [needle.state(*fact) for fact in first]
    context = hide(random, sentences, n_tokens, count, needle.INTRO)
    asked = random.sample(first, N_ROUNDS)
    messages = [""]
    for number in range(1, N_ROUNDS):
        stated = later[FACTS_PER_ROUND * (number - 1) : FACTS_PER_ROUND * number]
        messages.append(hide(random, [needle.state(*x) for x in stated], ROUND_TOKENS, count))
        if number > 1 and random.random() < 0.5:
            asked[number] = random.choice(later[: FACTS_PER_ROUND * (number - 1)])
    questions = tuple(needle.ask(*fact) for fact in asked)
    return Sample("multiturn", seed, context, questions, tuple(messages))
