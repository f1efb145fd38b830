"""Running tasks over methods: one prefill a document, all methods on it, results as they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xkv.errors import InputError
from xkv.evaluation.methods import parse_method
from xkv.evaluation.methods.lowrank import LowRank
from xkv.evaluation.methods.method import Compressed, Method
from xkv.evaluation.store import Key, Store
from xkv.evaluation.tasks import MakeSample, Sample
from xkv.evaluation.tasks.perplexity import PERPLEXITY, Continuation
from xkv.planning.document import Document
from xkv.planning.language_model import LanguageModel

CONTINUATION_QUESTIONS = 16
"""Questions that one continued text stands for: each of its tokens is a prediction."""

ROOM = 16
"""Tokens that an answer may have more than the right one."""

Progress = Callable[[int, str], None]
"""Called with (questions done since the last call, what is being done)."""


@dataclass(frozen=True)
class Setting:
    """A method with its options and, where its size is free, the ratio asked for."""

    label: str
    method: Method
    ratio: float | None

    def __str__(self) -> str:
        return self.label if self.ratio is None else f"{self.label} at {self.ratio:g} x"


def make_settings(
    labels: Sequence[str], ratios: Sequence[float], grouping: dict[str, Any] | None = None
) -> list[Setting]:
    """Every method at every ratio that it can be asked for, the full cache first.

    Args:
        labels: Methods as a user writes them.
        ratios: Ratios for those whose size is free.
        grouping: Options of ``xkv`` where it names no group size.

    Raises:
        InputError: If a method or option is unknown.
    """
    settings = [Setting("full", parse_method("full"), None)]
    for label in dict.fromkeys(labels):
        method = parse_method(label)
        if grouping and isinstance(method, LowRank):
            method = method.grouped(grouping)
        if label != "full":
            asked = ratios if method.has_free_size else [None]
            settings += [Setting(label, method, ratio) for ratio in asked]
    return settings


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Args:
        model: The model.
        tasks: Each task's name and how its samples are made.
        lengths: Tokens of the documents.
        settings: Methods; the full cache is the first.
        n_questions: Questions of each task at each length.
        first_seed: Seed of the first document; the next ones count up.
    """

    model: LanguageModel
    tasks: dict[str, MakeSample]
    lengths: Sequence[int]
    settings: Sequence[Setting]
    n_questions: int
    first_seed: int

    @property
    def n_answers(self) -> int:
        """Answers in all."""
        return len(self.tasks) * len(self.lengths) * len(self.settings) * self.n_questions

    def run(self, store: Store, progress: Progress) -> None:
        """Do what is not done yet.

        Raises:
            InputError: If a task cannot be made at a length, or the disk is full.
        """
        for length in self.lengths:
            for task in self.tasks:
                for sample in self._samples(task, length):
                    self._run_sample(sample, length, store, progress)

    def _samples(self, task: str, length: int) -> Iterator[Sample]:
        """Documents until there are questions enough."""
        n_left, seed = self.n_questions, self.first_seed
        while n_left:
            sample = self.tasks[task](seed, length, self.model.count)
            if isinstance(sample, Continuation):
                n_questions = CONTINUATION_QUESTIONS
            else:
                n_questions = len(sample.questions)
                if not sample.messages:
                    sample = replace(sample, questions=sample.questions[:n_left])
            yield sample
            n_left -= min(n_left, n_questions)
            seed += 1

    def _run_sample(self, sample: Sample, length: int, store: Store, progress: Progress) -> None:
        keys = {
            setting: Key(sample.task, length, sample.seed, setting.label, setting.ratio)
            for setting in self.settings
        }
        is_text = isinstance(sample, Continuation)
        n_questions = CONTINUATION_QUESTIONS if is_text else len(sample.questions)
        todo = [setting for setting, key in keys.items() if not store.is_done(key, n_questions)]
        n_done = len(self.settings) - len(todo)
        progress(n_done * n_questions, f"{sample.task} {length}")
        if not todo:
            return
        # the full cache's predictions are what others are compared with
        tokens = self.model.context_tokens(sample.context)
        document = self.model.prefill(tokens, sample.seed)
        reference: dict[str, Any] = {}
        for setting in self.settings:
            if setting not in todo and not (setting.label == "full" and sample.task == PERPLEXITY):
                continue
            try:
                if setting.method.is_query_aware and isinstance(sample, Continuation):
                    raise InputError("it looks at a question, and a text to continue has none")
                compressed = setting.method.compress(document, setting.ratio)
            except InputError as error:
                result = {"problem": str(error)}
            else:
                result = self._answer(sample, document, compressed, setting.method, reference)
            if setting in todo:
                store.add(keys[setting], result)
                progress(n_questions, f"{sample.task} {length}")

    def _answer(
        self,
        sample: Sample,
        document: Document,
        compressed: Compressed,
        method: Method,
        reference: dict[str, Any],
    ) -> dict[str, Any]:
        result: dict[str, Any] = {
            "tokens": document.n_tokens,
            "dense_bytes": document.dense_bytes,
            "held_bytes": compressed.held_bytes,
            "detail": compressed.detail,
        }
        if isinstance(sample, Continuation):
            return {**result, **self._continue(sample, compressed, method, reference)}
        if sample.messages:
            return {**result, **self._converse(sample, document, compressed)}
        answers = self._ask(sample, compressed)
        return {**result, "answers": _scored(sample, answers)}

    def _ask(self, sample: Sample, compressed: Compressed) -> list[str]:
        """Ask every question alone; those of the same length go as a batch."""
        model = self.model
        by_length: dict[int, list[int]] = defaultdict(list)
        tokens = [model.question_tokens(q.text, q.prefix) for q in sample.questions]
        for index, row in enumerate(tokens):
            by_length[len(row)].append(index)
        answers = [""] * len(tokens)
        for indices in by_length.values():
            n_tokens = max(self._answer_tokens(sample, index) for index in indices)
            batch = [tokens[index] for index in indices]
            replies = model.generate(batch, compressed.start(), n_tokens)
            for index, reply in zip(indices, replies, strict=True):
                answers[index] = model.decode(reply)
        return answers

    def _answer_tokens(self, sample: Sample, index: int) -> int:
        """Most tokens of an answer: room for other words than those of the right one."""
        return self.model.count(sample.questions[index].answer) + ROOM

    def _converse(
        self, sample: Sample, document: Document, compressed: Compressed
    ) -> dict[str, Any]:
        """Ask one question after another; messages and replies stay in the cache."""
        model, conversation = self.model, compressed.converse()
        answers = []
        rest: list[int] = []
        rounds = zip(sample.messages, sample.questions, strict=True)
        for turn, (message, question) in enumerate(rounds):
            tokens = model.question_tokens(question.text, question.prefix, message, turn)
            n_tokens = self._answer_tokens(sample, turn)
            before = conversation.layers[0].offset
            reply = model.generate([rest + tokens], conversation.layers, n_tokens)[0]
            n_taken = conversation.layers[0].offset - before - len(rest) - len(tokens)
            rest = reply[n_taken:]
            answers.append(model.decode(reply))
        dense, held = conversation.bytes_now()
        return {
            "answers": _scored(sample, answers),
            "dense_bytes": dense,
            "held_bytes": held,
        }

    def _continue(
        self,
        sample: Continuation,
        compressed: Compressed,
        method: Method,
        reference: dict[str, Any],
    ) -> dict[str, Any]:
        """Perplexity of a continuation, and how far the next-token distributions moved."""
        tokens = self.model.encode(sample.continuation)
        layers = compressed.layers(method.is_stepwise)
        rows = self.model.log_probabilities(tokens, layers, method.is_stepwise)
        full = reference.setdefault("rows", rows)
        likely = np.take_along_axis(rows[:-1], np.array(tokens[1:])[:, None], -1)
        divergence = (np.exp(full) * (full - rows)).sum(-1)
        return {
            "nll": float(-likely.mean()),
            "kl": float(divergence.mean()),
            "n_next": len(tokens) - 1,
        }


def _scored(sample: Sample, answers: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "question": question.text,
            "references": list(question.references),
            "prediction": answer,
            "score": question.score(answer),
        }
        for question, answer in zip(sample.questions, answers, strict=True)
    ]
