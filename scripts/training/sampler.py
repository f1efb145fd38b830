"""Training sequences: conversations about documents, the evaluation's tasks, and recall."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast

from training.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER
from xkv.errors import InputError
from xkv.evaluation.tasks import TASKS
from xkv.evaluation.tasks.haystack import draw_names, draw_number, draw_uuid
from xkv.tiny import documents

TASK_LENGTH = 256  # From this length on, most sequences are of the evaluation's tasks.
CONVERSATION_SHARE = 0.2
TASK_WEIGHTS = {
    "needle": 3.0,
    "multikey": 1.5,
    "multivalue": 3.0,
    "multiquery": 3.0,
    "variables": 1.5,
    "qa": 0.3,
    "key_value": 1.0,
    "common_words": 0.5,
    "frequent_words": 0.5,
    "multiturn": 1.0,
}
# What to list next is learned far more slowly than how to copy it.
LIST_WEIGHT = 4.0
TOKENS_PER_STEP = 4608
FILLER_WEIGHT = 0.02
QUESTION_TOKENS = 17  # The longest question with its answer and special tokens.


class Sampler:
    """Draws training sequences: the kind, token ids, and one loss weight a token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.list_marks = frozenset(tokenizer.convert_tokens_to_ids([",", ":"]))

    def batch(self, length: int, is_recall: bool) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Kind of each row, token ids and loss weights, ``[B, length]`` of TOKENS_PER_STEP tokens.

        A kind is a task's name, "document" or "recall".
        """
        kinds, rows = [], []
        for _ in range(max(1, TOKENS_PER_STEP // length)):
            kind = "recall"
            if not is_recall:
                kind = self._draw_kind(length)
            draw = {"recall": self._recall, "document": self._conversation}.get(kind)
            row = draw(length) if draw else self._task(kind, length)
            if any(row[1]):
                kinds.append(kind)
                rows.append(row)
        if not rows:
            return self.batch(length, is_recall)
        ids = [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows]
        weights = [row + [0.0] * (length - len(row)) for _, row in rows]
        return kinds, torch.tensor(ids), torch.tensor(weights)

    def _draw_kind(self, length: int) -> str:
        if length < TASK_LENGTH or self.random.random() < CONVERSATION_SHARE:
            return "document"
        return self.random.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _conversation(self, length: int) -> tuple[list[int], list[float]]:
        """A document and many questions about it, in one of three layouts."""
        r = self.random
        n_facts = r.randint(1, max(4, min(100, length // 14)))
        n_questions = max(2, min(2 * n_facts, length // 2 // QUESTION_TOKENS, 48))
        n_tokens = length - n_questions * QUESTION_TOKENS - 8  # 8: what the longest layout adds.
        n_facts = max(1, min(n_facts, (n_tokens - 3) // 5))
        document = documents.make_document(r.randrange(2**40), n_tokens, n_facts)
        asked = r.sample(document.facts, n_facts) + r.choices(document.facts, k=n_questions)
        turns = [(documents.ask(r, fact.name), fact.answer) for fact in asked[:n_questions]]
        layout = r.random()
        if layout < 0.7:
            opening = [(f"{BOS}{USER}{document.text} {turns[0][0]}", FILLER_WEIGHT)]
        elif layout < 0.85:
            opening = [
                (f"{BOS}{USER}{document.text}{END}{ASSISTANT}", FILLER_WEIGHT),
                (f"Noted.{END}", 1.0),
                (f"{USER}{turns[0][0]}", 0.0),
            ]
        else:
            opening = [(f"{BOS}{SYSTEM}{document.text}{END}{USER}{turns[0][0]}", FILLER_WEIGHT)]
        parts = list(opening)
        for index, (question, answer) in enumerate(turns):
            prompt = f"{END}{ASSISTANT}" if index == 0 else f"{USER}{question}{END}{ASSISTANT}"
            parts += [(prompt, 0.0), (answer + END, 1.0)]
        return self._weighted(parts)

    def _task(self, name: str, length: int) -> tuple[list[int], list[float]]:
        """A sample of one of the evaluation's tasks, with as many of its questions as fit."""
        r = self.random
        n_tokens = max(length * 5 // 8, length - r.randint(80, 700))
        try:
            # a seed that no evaluation takes
            sample = TASKS[name](-1 - r.randrange(2**40), n_tokens, self._count)
        except InputError:  # too short for this task
            return [], []
        ids, weights = self._weighted([(f"{BOS}{USER}{sample.context}", 0.0)])
        questions = list(zip(sample.messages or [""] * 99, sample.questions, strict=False))
        if not sample.messages:
            r.shuffle(questions)
        for index, (message, question) in enumerate(questions):
            asked = f"{message} {question.text}{END}{ASSISTANT}"
            turn = self._weighted(
                [
                    (asked if index == 0 else USER + asked, 0.0),
                    (question.prefix, 0.0),
                    (question.answer + END, 1.0),
                ]
            )
            if len(ids) + len(turn[0]) > length:
                break
            weights += [
                LIST_WEIGHT * weight if before in self.list_marks else weight
                for before, weight in zip([0, *turn[0]], turn[1], strict=False)
            ]
            ids += turn[0]
        return ids, weights

    def _count(self, text: str) -> int:
        return len(self._encode(text))

    def _weighted(self, parts: Sequence[tuple[str, float]]) -> tuple[list[int], list[float]]:
        """Token ids of texts one after another, with each one's weight."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            piece = self._encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def _recall(self, length: int) -> tuple[list[int], list[float]]:
        """Facts repeated in random order; a value counts once its name was seen.

        Values are words, numbers or UUIDs: what is rare elsewhere is common here.
        """
        r = self.random
        draw = r.choice((None, draw_number, draw_uuid))
        n_facts = r.randint(2, max(3, min(32, length // (40 if draw is draw_uuid else 12))))
        if draw is None:
            document = documents.make_document(r.randrange(2**40), 5 * n_facts, n_facts)
            facts = [(fact.name, fact.said) for fact in document.facts]
        else:
            facts = [(f"{name}:", f"{draw(r)}.") for name in draw_names(r, n_facts)]
        rows = [(self._encode(name), self._encode(value)) for name, value in facts]
        ids, weights, seen = [self.tokenizer.bos_token_id], [0.0], set()
        while True:
            index = r.randrange(n_facts)
            name, value = rows[index]
            if len(ids) + len(name) + len(value) > length:
                return ids, weights
            ids += name + value
            weights += [0.0] * len(name)
            weights += [float(index in seen)] * (len(value) - 1) + [0.0]
            seen.add(index)
