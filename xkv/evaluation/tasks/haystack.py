"""Text around the needles, filled to a length in tokens of any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from uuid import UUID

from xkv.errors import InputError
from xkv.evaluation.tasks.sample import Count
from xkv.tiny.documents import filler_sentence
from xkv.tiny.words import ADJECTIVES, NAMES, NOUNS

_PARAGRAPH = 6


def hide(
    random: Random, needles: Sequence[str], n_tokens: int, count: Count, intro: str = ""
) -> str:
    """Hide sentences, in their order, at random places of an English-looking text.

    Args:
        random: Source of the text.
        needles: Sentences.
        n_tokens: Most tokens of the whole.
        count: Counts them.
        intro: What comes first.

    Raises:
        InputError: If the needles alone are longer.
    """
    fillers: list[str] = []
    total = sum(map(count, (intro, *needles)))
    if total > n_tokens:
        raise InputError(f"a length of {n_tokens} tokens is too short: this task needs {total}")
    while True:
        sentence = filler_sentence(random)
        total += count(sentence)
        if total > n_tokens:
            break
        fillers.append(sentence)
    while True:
        text = "\n\n".join(filter(None, [intro, _mix(random, needles, fillers)]))
        # tokens are few more where sentences meet
        excess = count(text) - n_tokens
        if excess <= 0 or not fillers:
            return text
        del fillers[: max(1, excess // 16)]


def draw_number(random: Random) -> str:
    """A number of seven digits."""
    return str(random.randrange(10**6, 10**7))


def draw_uuid(random: Random) -> str:
    """A UUID of version 4."""
    return str(UUID(int=random.getrandbits(128), version=4))


def draw_words(random: Random) -> str:
    """An adjective and a noun."""
    return f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"


def draw_names(random: Random, n: int) -> list[str]:
    """Distinct first names."""
    return random.sample(NAMES, n)


def _mix(random: Random, needles: Sequence[str], fillers: Sequence[str]) -> str:
    slots = [True] * len(needles) + [False] * len(fillers)
    random.shuffle(slots)
    next_needle, next_filler = iter(needles), iter(fillers)
    sentences = [next(next_needle) if is_needle else next(next_filler) for is_needle in slots]
    starts = range(0, len(sentences), _PARAGRAPH)
    return "\n\n".join(" ".join(sentences[start : start + _PARAGRAPH]) for start in starts)
