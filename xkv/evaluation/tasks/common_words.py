"""Common words: ten words of a long list come ten times as often as all others; which?"""

from __future__ import annotations

from random import Random

from xkv.errors import InputError
from xkv.evaluation.tasks.sample import Count, Question, Sample
from xkv.tiny.words import ADJECTIVES, NOUNS, VERBS

N_COMMON = 10
RATIO = 10
INTRO = "Here is a list of words. Some come again and again. Remember the most common words."


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Ten common words among rare ones that come a tenth as often.

    RULER's counts are 30 and 3 in a list of any length; here they grow with it, as the words are
    those of a small vocabulary.

    Source: RULER's common words extraction, arXiv:2404.06654.
    """
    random = Random(f"common_words {seed} {n_tokens}")
    words = [*NOUNS, *ADJECTIVES, *VERBS]
    random.shuffle(words)
    common, rare = words[:N_COMMON], words[N_COMMON:]
    n_words = int((n_tokens - count(INTRO)) * len(words) / count(", ".join(words)))
    times_rare = max(1, n_words // (RATIO * N_COMMON + len(rare)))
    times_common = min(RATIO * times_rare, n_words // (2 * N_COMMON))
    if times_common < 2:
        raise InputError(f"a length of {n_tokens} tokens is too short for common_words")
    listed = (common * times_common + rare * (times_rare + 1))[:n_words]
    random.shuffle(listed)
    while count(text := f"{INTRO}\n\n{', '.join(listed)}.") > n_tokens:
        del listed[-max(1, len(listed) // 50) :]
    question = Question(
        f"What are the {N_COMMON} most common words of the list?",
        "The most common words are",
        f"{', '.join(common)}.",
        tuple(common),
    )
    return Sample("common_words", seed, text, (question,))
