"""Perplexity and divergence: how well a text is continued out of a compressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from xkv.errors import InputError
from xkv.evaluation.tasks.haystack import hide
from xkv.evaluation.tasks.qa import read_text
from xkv.evaluation.tasks.sample import Count, Question, Sample

PERPLEXITY = "ppl"
CONTINUATION_TOKENS = 256


@dataclass(frozen=True)
class Continuation(Sample):
    """A text and what comes after it, instead of questions."""

    continuation: str = ""


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """A continuation of the text without needles that other tasks hide them in."""
    random = Random(f"perplexity {seed} {n_tokens}")
    text = hide(random, [], n_tokens + CONTINUATION_TOKENS, count)
    return _split(text, seed, n_tokens, count, start=0)


class FileText:
    """A text file to continue.

    Raises:
        InputError: If it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._text, self._path = read_text(path), path

    def make(self, seed: int, n_tokens: int, count: Count) -> Sample:
        """A part of the text: the seed says which, counted in parts of this length.

        Raises:
            InputError: If the text is shorter than the first part.
        """
        n_all = count(self._text)
        needed = n_tokens + CONTINUATION_TOKENS
        if n_all < needed:
            raise InputError(
                f"{self._path} has {n_all} tokens, and ppl at a length of {n_tokens} needs {needed}"
            )
        start = seed % (n_all // needed) / (n_all // needed)
        return _split(self._text, seed, n_tokens, count, int(start * len(self._text)))


def _split(text: str, seed: int, n_tokens: int, count: Count, start: int) -> Continuation:
    """Cut a text at spaces, after ``n_tokens`` tokens and after the continuation's."""
    text = text[start:]
    first = _cut(text, n_tokens, count)
    second = first + _cut(text[first:], CONTINUATION_TOKENS, count)
    # one piece of text to be judged: it counts as the sample's question
    question = (Question("", "", "", ("",)),)
    return Continuation(
        PERPLEXITY, seed, text[:first], question, continuation=text[first:second].strip()
    )


def _cut(text: str, n_tokens: int, count: Count) -> int:
    """Length in characters of the longest beginning of at most ``n_tokens`` tokens."""
    low, high = 0, min(len(text), 16 * n_tokens)
    while low < high:
        middle = (low + high + 1) // 2
        if count(text[:middle]) <= n_tokens:
            low = middle
        else:
            high = middle - 1
    if low == len(text):
        return low
    space = max(text.rfind(" ", 0, low), text.rfind("\n", 0, low))
    return space if space > 0 else low
