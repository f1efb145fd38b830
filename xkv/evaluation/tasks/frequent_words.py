"""Frequent words: word frequencies of a text fall by Zipf's law; which three come most often?"""

from __future__ import annotations

from random import Random

from xkv.errors import InputError
from xkv.evaluation.tasks.sample import Count, Question, Sample
from xkv.tiny.words import ADJECTIVES, NOUNS, VERBS

N_WORDS = 100
N_FREQUENT = 3
EXPONENT = 2.0
INTRO = "Here is a list of words. Some come again and again. Remember the most frequent words."


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """One question for the three most frequent words, after a word that is noise.

    Source: RULER's frequent words extraction, arXiv:2404.06654.
    """
    random = Random(f"frequent_words {seed} {n_tokens}")
    words = random.sample([*NOUNS, *ADJECTIVES, *VERBS], N_WORDS)
    # the first rank is noise, as in RULER: dots
    weights = [rank**-EXPONENT for rank in range(1, N_WORDS + 2)]
    share_dots = weights[0] / sum(weights)
    per_word = count(" ".join(words)) / N_WORDS * (1 - share_dots)
    per_word += count(" ".join(["..."] * N_WORDS)) / N_WORDS * share_dots
    n_words = int((n_tokens - count(INTRO)) / per_word)
    if n_words < N_WORDS:
        raise InputError(f"a length of {n_tokens} tokens is too short for frequent_words")
    share = n_words / sum(weights)
    listed = ["..."] * round(weights[0] * share)
    for word, weight in zip(words, weights[1:], strict=True):
        listed += [word] * max(1, round(weight * share))
    random.shuffle(listed)
    frequent = words[:N_FREQUENT]
    while count(text := f"{INTRO}\n\n{' '.join(listed)}.") > n_tokens:
        listed.pop()
    question = Question(
        f"Which {N_FREQUENT} words are the most frequent, dots left out?",
        "The most frequent words are",
        f"{', '.join(frequent)}.",
        tuple(frequent),
    )
    return Sample("frequent_words", seed, text, (question,))
