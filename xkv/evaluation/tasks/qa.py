"""Questions over a text: the built-in facts, or a text file with a file of questions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from xkv.errors import InputError
from xkv.evaluation.tasks.haystack import hide
from xkv.evaluation.tasks.sample import Count, Question, Sample
from xkv.tiny.documents import draw_facts

TOKENS_PER_FACT = 48
MOST_FACTS = 64
N_QUESTIONS = 16
INTRO = "Read the text and remember who did what."


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """Facts such as "Marta painted crimson lanterns." in a text, and what a person did is asked."""
    random = Random(f"qa {seed} {n_tokens}")
    facts = draw_facts(random, max(1, min(MOST_FACTS, n_tokens // TOKENS_PER_FACT)))
    context = hide(random, [fact.answer for fact in facts], n_tokens, count, INTRO)
    questions = [
        Question(fact.question, fact.name, fact.said, (fact.said.rstrip("."),))
        for fact in random.sample(facts, min(N_QUESTIONS, len(facts)))
    ]
    return Sample("qa", seed, context, tuple(questions))


class TextQuestions:
    """Questions over a text of the user's own.

    Args:
        text: Path of a UTF-8 text file.
        questions: Path of a file with one JSON object a line: ``question``, and ``answers``, a list
            of strings of which a right answer contains one.

    Raises:
        InputError: If a file cannot be read, by its name and line.
    """

    def __init__(self, text: str, questions: str) -> None:
        self._paragraphs = [x.strip() for x in read_text(text).split("\n\n") if x.strip()]
        if not self._paragraphs:
            raise InputError(f"{text} is empty")
        self._questions = []
        for number, line in enumerate(read_text(questions).splitlines(), 1):
            if line.strip():
                self._questions.append(_parse(line, f"{questions}, line {number}"))
        self._names = text, questions

    def make(self, seed: int, n_tokens: int, count: Count) -> Sample:
        """A part of the text that begins at a random paragraph, and questions it can answer."""
        random = Random(f"text {seed} {n_tokens}")
        start, total, chosen = random.randrange(len(self._paragraphs)), 0, []
        for paragraph in self._paragraphs[start:] + self._paragraphs[:start]:
            total += count(f"{paragraph}\n\n")
            if total > n_tokens:
                break
            chosen.append(paragraph)
        context = "\n\n".join(chosen)
        asked = [q for q in self._questions if q.score(context)]
        if not asked:
            raise InputError(
                f"no answer of {self._names[1]} is in the {n_tokens} tokens of {self._names[0]} "
                f"from paragraph {start + 1} on; ask for a greater length"
            )
        return Sample("qa", seed, context, tuple(asked[:N_QUESTIONS]))


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a UTF-8 text") from error


def _parse(line: str, place: str) -> Question:
    try:
        entry = json.loads(line)
        answers = tuple(map(str, entry["answers"]))
        text = str(entry["question"])
    except (ValueError, KeyError, TypeError):
        answers, text = (), ""
    if not answers or not text:
        raise InputError(
            f'{place}: not a JSON object like {{"question": "...", "answers": ["..."]}}'
        )
    return Question(text, "", answers[0], answers, needs_all=False)
