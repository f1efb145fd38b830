"""Tries everything that mlx-lm does to a prompt cache, in any order, against the plain model.

At full rank the logits after any sequence are those of the plain model on the same tokens: plain,
MLA, latents with an indexer (``CacheList``), sliding windows, several rotations.
"""

from __future__ import annotations

import copy
import functools
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from mlx_lm.models import cache as mlx_cache

import xkv
from tests.architectures import build
from xkv.backends.mlx_metal.model.enabled import enabled_state, lowrank_cache
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.checks.invariants import broken_invariants

generation = importlib.import_module("mlx_lm.generate")

MODELS = ("llama", "qwen3", "deepseek_v3", "deepseek_v32", "minicpm3", "gemma3_text")
"""Chunked and plain attention, normed keys, MLA, CacheList, wide latents, sliding windows."""
TOLERANCE = 1e-3
"""Relative error of logits in float32."""


@functools.cache
def model_of(name: str) -> Any:
    return build(name)


@dataclass
class Conversation:
    """A prompt cache and the tokens it holds."""

    caches: list[Any]
    tokens: list[int]


class ModelMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        name=st.sampled_from(MODELS),
        group_size=st.integers(1, 3),
        window=st.sampled_from((0, 8, 16)),
        max_tail=st.sampled_from((1, 16, 40)),
        seed=st.integers(0, 2**16),
    )
    def begin(self, name: str, seed: int, **options: int) -> None:
        self.random = np.random.default_rng(seed)
        self.model = model_of(name)
        xkv.enable(self.model, rank_k="full", rank_v="full", attention="exact", sinks=2, **options)
        self.conversations = [Conversation(mlx_cache.make_prompt_cache(self.model), [])]

    def teardown(self) -> None:
        if hasattr(self, "model"):
            xkv.disable(self.model)

    def draw(self, n_tokens: int) -> list[int]:
        return self.random.integers(3, 250, n_tokens).tolist()

    def any_of(self, data: Any) -> Conversation:
        number = data.draw(st.integers(0, len(self.conversations) - 1), label="conversation")
        return self.conversations[number]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """The plain model's, after all of these."""
        return np.array(self.model(mx.array([tokens]))[0, -1].astype(mx.float32))

    def take(self, talk: Conversation, tokens: list[int]) -> None:
        """One call of the model."""
        logits = self.model(mx.array([tokens]), cache=talk.caches)[0, -1]
        talk.tokens += tokens
        self.compare(talk, np.array(logits.astype(mx.float32)))

    def compare(self, talk: Conversation, got: np.ndarray) -> None:
        want = self.logits(talk.tokens)
        assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)
        self.check(talk)

    def check(self, talk: Conversation) -> None:
        cache = lowrank_cache(talk.caches)
        assert cache is not None and broken_invariants(cache) == []
        offsets = {x.offset for x in flatten(talk.caches) if hasattr(x, "offset")}
        assert offsets == {len(talk.tokens)}

    def can_trim(self, talk: Conversation) -> bool:
        return mlx_cache.can_trim_prompt_cache(talk.caches)

    @rule(data=st.data(), n_tokens=st.sampled_from((1, 1, 2, 5, 16, 17, 40)))
    def call(self, data: Any, n_tokens: int) -> None:
        self.take(self.any_of(data), self.draw(n_tokens))

    @rule(
        data=st.data(),
        n_tokens=st.sampled_from((2, 17, 18, 60, 150)),
        n_answer=st.integers(1, 4),
        step=st.sampled_from((17, 64, 2048)),
    )
    def turn(self, data: Any, n_tokens: int, n_answer: int, step: int) -> None:
        """A prompt and an answer, as mlx-lm's loop takes them."""
        talk, prompt = self.any_of(data), self.draw(n_tokens)
        steps = generation.generate_step(
            mx.array(prompt),
            self.model,
            max_tokens=n_answer,
            prompt_cache=talk.caches,
            prefill_step_size=step,
        )
        answer = [int(token) for token, _ in steps]
        # the loop runs one token ahead
        n_held = max(x.offset for x in flatten(talk.caches) if hasattr(x, "offset"))
        talk.tokens += [*prompt, *answer]
        assert len(talk.tokens) - 1 <= n_held <= len(talk.tokens)
        talk.tokens = talk.tokens[:n_held]
        self.check(talk)
        self.take(talk, self.draw(1))

    @rule(data=st.data(), n_tokens=st.one_of(st.integers(0, 30), st.integers(0, 500)))
    def trim(self, data: Any, n_tokens: int) -> None:
        talk = self.any_of(data)
        if not self.can_trim(talk):
            return
        n_trimmed = mlx_cache.trim_prompt_cache(talk.caches, n_tokens)
        assert n_trimmed == min(n_tokens, len(talk.tokens))
        talk.tokens = talk.tokens[: len(talk.tokens) - n_trimmed]
        self.check(talk)
        self.take(talk, self.draw(1))

    @precondition(lambda self: len(self.conversations) < 3)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        talk = self.any_of(data)
        twin = Conversation(copy.deepcopy(talk.caches), list(talk.tokens))
        self.conversations.append(twin)
        self.take(twin, self.draw(1))

    @rule(data=st.data())
    def save_and_load(self, data: Any) -> None:
        talk = self.any_of(data)
        if not talk.tokens:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.safetensors")
            xkv.save_prompt_cache(path, talk.caches)
            talk.caches = xkv.load_prompt_cache(path)
        self.take(talk, self.draw(1))

    @rule(data=st.data(), n_tokens=st.sampled_from((2, 20, 60)), n_draft=st.integers(1, 4))
    def speculate(self, data: Any, n_tokens: int, n_draft: int) -> None:
        """Rounds of drafts by the model itself, which are always right."""
        talk = self.any_of(data)
        if not self.can_trim(talk) or talk.tokens:
            return
        prompt = self.draw(n_tokens)
        draft = mlx_cache.make_prompt_cache(self.model)
        try:
            steps = generation.speculative_generate_step(
                mx.array(prompt),
                self.model,
                self.model,
                num_draft_tokens=n_draft,
                max_tokens=5,
                prompt_cache=talk.caches + draft,
            )
            answer = [int(token) for token, *_ in steps]
        except ValueError as error:
            # windows that would not forget again
            assert "window" in str(error) or "trim" in str(error)
            self.check(talk)
            return
        n_held = max(x.offset for x in flatten(talk.caches) if hasattr(x, "offset"))
        talk.tokens += [*prompt, *answer]
        talk.tokens = talk.tokens[:n_held]
        self.check(talk)
        self.take(talk, self.draw(1))

    @rule(data=st.data(), n_steps=st.integers(1, 20), is_late=st.booleans())
    def batch(self, data: Any, n_steps: int, is_late: bool) -> None:
        """All conversations and twins decode in one batch that one may join late, then leave it."""
        talks = [x for x in (*self.conversations, *self.conversations) if x.tokens]
        if enabled_state(self.model).why_not_batched or not talks:
            return
        talks = [Conversation(x.caches, list(x.tokens)) for x in talks]
        first = merged(talks[:-1] if is_late and len(talks) > 1 else talks)
        rows = len(talks) - is_late if len(talks) > 1 else 1
        for step in range(n_steps):
            if step == n_steps // 2 and rows < len(talks):
                for layer, late in zip(first, merged(talks[rows:]), strict=True):
                    layer.extend(late)
                rows = len(talks)
            self.step(first, talks[:rows])
        if rows < len(talks):
            return
        order = data.draw(st.permutations(range(rows)), label="order")[: -(-rows // 2)]
        for layer in first:
            layer.filter(order)
        talks = [talks[number] for number in order]
        self.step(first, talks)
        for number, talk in enumerate(talks):
            talk.caches = [layer.extract(number) for layer in first]
            self.check(talk)
        self.conversations = talks[:3]
        self.take(self.any_of(data), self.draw(1))

    def step(self, caches: list[Any], talks: list[Conversation]) -> None:
        """One token for each sequence of a batch."""
        tokens = self.draw(len(talks))
        logits = self.model(mx.array(tokens)[:, None], cache=caches)[:, -1]
        for number, (talk, token) in enumerate(zip(talks, tokens, strict=True)):
            talk.tokens.append(token)
            want = self.logits(talk.tokens)
            got = np.array(logits[number].astype(mx.float32))
            assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


def merged(talks: list[Conversation]) -> list[Any]:
    """A batch of conversations, layer by layer, as mlx-lm makes it."""
    columns = zip(*(talk.caches for talk in talks), strict=True)
    return [column[0].merge(list(column)) for column in columns]
