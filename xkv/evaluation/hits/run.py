"""Running the tasks ``hits``: one prefill a document, all methods on it, all scenarios on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xkv.errors import InputError
from xkv.evaluation.hits import conversation
from xkv.evaluation.hits.conversation import TASKS, Talk
from xkv.evaluation.hits.scenarios import SCENARIOS, Layers, branched, play, say
from xkv.evaluation.methods.method import Compressed
from xkv.evaluation.run import ROOM, Progress, Setting
from xkv.evaluation.store import Key, Store
from xkv.evaluation.tasks.sample import Question
from xkv.planning.language_model import LanguageModel

HITS = "hits"
METHODS = ("xkv",)
"""Beside the full cache, where none are asked for."""
RATIOS = (4.0, 8.0, 16.0)
ANSWERS = len(SCENARIOS) * len(TASKS)
"""Scores of a method on one document."""


@dataclass(frozen=True)
class Hits:
    """What is measured.

    Args:
        model: The model.
        lengths: Tokens of the documents.
        settings: Methods; the full cache is the first.
        n_documents: Conversations at each length: questions of each task in each scenario.
        first_seed: Seed of the first; the next ones count up.
    """

    model: LanguageModel
    lengths: Sequence[int]
    settings: Sequence[Setting]
    n_documents: int
    first_seed: int

    @property
    def n_answers(self) -> int:
        """Answers in all."""
        return len(self.lengths) * len(self.settings) * self.n_documents * ANSWERS

    def run(self, store: Store, progress: Progress) -> None:
        """Do what is not done yet.

        Raises:
            InputError: If a document cannot be made at a length, or the disk is full.
        """
        for length in self.lengths:
            for seed in range(self.first_seed, self.first_seed + self.n_documents):
                self._run_document(seed, length, store, progress)

    def _run_document(self, seed: int, length: int, store: Store, progress: Progress) -> None:
        keys = {x: Key(HITS, length, seed, x.label, x.ratio) for x in self.settings}
        todo = [setting for setting, key in keys.items() if not store.is_done(key, ANSWERS)]
        progress((len(keys) - len(todo)) * ANSWERS, f"{HITS} {length}")
        if not todo:
            return
        talk = conversation.make(seed, length, self.model.count)
        document = self.model.prefill(self.model.context_tokens(talk.context), seed)
        for setting in todo:
            try:
                if setting.method.is_query_aware:
                    raise InputError("it looks at a question, and a conversation has many")
                compressed = setting.method.compress(document, setting.ratio)
            except InputError as error:
                result: dict[str, Any] = {"problem": str(error)}
            else:
                result = {
                    "tokens": document.n_tokens,
                    "dense_bytes": document.dense_bytes,
                    "held_bytes": compressed.held_bytes,
                    "answers": self._talk(talk, compressed),
                }
            store.add(keys[setting], result)
            progress(ANSWERS, f"{HITS} {length}")

    def _talk(self, talk: Talk, compressed: Compressed) -> list[dict[str, Any]]:
        layers = compressed.converse().layers
        for turn, exchange in enumerate(talk.opening):
            say(self.model, layers, exchange, turn)
        answers: list[dict[str, Any]] = []
        for scenario in SCENARIOS:
            after = play(scenario, self.model, branched(layers), talk)
            answers += [{"scenario": scenario, **x} for x in self._ask(talk, after)]
        return answers

    def _ask(self, talk: Talk, layers: Layers) -> list[dict[str, Any]]:
        """Every task's question alone; one that is asked twice is answered once."""
        said: dict[tuple[str, str], str] = {}
        answers = []
        for task, question in talk.questions.items():
            asked = question.text, question.prefix
            if asked not in said:
                said[asked] = self._answer(question, branched(layers))
            answers.append(
                {
                    "task": task,
                    "question": question.text,
                    "prefix": question.prefix,
                    "answer": question.answer,
                    "prediction": said[asked],
                    "score": question.score(said[asked]),
                }
            )
        return answers

    def _answer(self, question: Question, layers: Layers) -> str:
        model = self.model
        tokens = model.question_tokens(question.text, question.prefix, turn=1)
        n_tokens = model.count(question.answer) + ROOM
        return model.decode(model.generate([tokens], layers, n_tokens)[0])
