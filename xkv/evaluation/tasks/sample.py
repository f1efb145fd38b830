"""What a task is made of: a context, questions about it, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str], int]
"""Tokens of a text, without special tokens, by the tokenizer of the model that is measured."""


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Args:
        text: What the user asks.
        prefix: Beginning of the answer, which the model is given.
        answer: A right continuation of ``prefix``.
        references: Strings that a right answer contains.
        needs_all: Whether the score is the share of the references in the answer (RULER's
            ``string_match_all``), or 1 if any of them is (``string_match_part``).
    """

    text: str
    prefix: str
    answer: str
    references: tuple[str, ...]
    needs_all: bool = True

    def score(self, prediction: str) -> float:
        """Score of an answer, from 0 to 1: case and white space do not count.

        Source: RULER, arXiv:2404.06654.
        """
        said = _plain(prediction)
        found = [_plain(reference) in said for reference in self.references]
        return sum(found) / len(found) if self.needs_all else float(any(found))


@dataclass(frozen=True)
class Sample:
    """A context with its questions.

    Args:
        task: Name of the task.
        seed: Seed it was drawn with.
        context: The text that is compressed, at most as long as asked for.
        questions: Each is asked alone, directly after the context; in a conversation one after
            another.
        messages: For a conversation, the text that comes before each question.
    """

    task: str
    seed: int
    context: str
    questions: tuple[Question, ...]
    messages: tuple[str, ...] = ()


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
