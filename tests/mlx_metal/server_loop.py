"""mlx-lm's loop around the server's batch, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from queue import Queue
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.batches import Batches

OPTIONS: dict[str, Any] = {
    "group_size": 2,
    "window": 16,
    "max_tail": 16,
    "rank_k": 24,
    "rank_v": 32,
}
N_TOKENS = 8
PROMPTS = [[3 + (i * 7 + n) % 200 for i in range(n)] for n in (120, 41, 67)]


class Loop:
    """What mlx-lm's loop does with a batch.

    Args:
        model: Enabled.
        prompts: Of requests that are there from the start.
        n_tokens: Of each answer.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]] = PROMPTS,
        n_tokens: int = N_TOKENS,
    ) -> None:
        self.answers: list[Answers] = []
        self.kept: list[tuple[list[int], list[Any]]] = []
        self.n_tokens = n_tokens
        self.batches = Batches(
            self._new_answers,
            lambda tokens, cache: self.kept.append((tokens, cache)),
            model,
            completion_batch_size=4,
            prefill_batch_size=8,
            prefill_step_size=32,
        )
        self.tokens: dict[int, list[int]] = {}
        self.prompts_done: list[int] = []
        self.ended: list[int] = []
        for prompt in prompts:
            self.insert(prompt)

    def _new_answers(self) -> Answers:
        self.answers.append(new_answers())
        return self.answers[-1]

    def insert(self, prompt: list[int]) -> int:
        """One more request; its number."""
        (uid,) = self.batches.insert([prompt], max_tokens=[self.n_tokens])
        self.tokens[uid] = []
        return int(uid)

    def fail_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One step of all answers, in which the device fails."""

        def failing(*args: Any) -> None:
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as broken:
            broken.setattr(type(self.batches._generation_batch), "next", failing)
            self.run(1)
        assert all(len(failures(answers)) == 1 for answers in self.answers)

    def lengths(self) -> list[int]:
        """Tokens of each answer so far."""
        return [len(tokens) for tokens in self.tokens.values()]

    def run(self, n_steps: int = 500) -> None:
        for _ in range(n_steps):
            prompts, generated = self.batches.next()
            self.prompts_done += [x.uid for x in prompts if x.end_of_prompt]
            for response in generated:
                if response.prompt_cache != []:
                    self.tokens[response.uid].append(response.token)
                if response.finish_reason is not None:
                    self.ended.append(response.uid)
            if not prompts and not generated:
                return


def new_answers() -> Answers:
    answers = Answers(Queue(), SimpleNamespace(stop_words=[], logprobs=False, top_logprobs=0), None)
    answers.context = SimpleNamespace(_should_stop=False)
    return answers


def alone(model: nn.Module, prompt: list[int], n_tokens: int = N_TOKENS) -> list[int]:
    cache = make_prompt_cache(model)
    steps = generate_step(mx.array(prompt), model, max_tokens=n_tokens, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def failures(answers: Answers) -> list[Exception]:
    items = [answers._queue.get_nowait() for _ in range(answers._queue.qsize())]
    return [item for item in items if isinstance(item, Exception)]
