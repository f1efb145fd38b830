"""A draft model's tokens: how they are verified, and how many of them the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.model.enabled import lowrank_cache

N_DRAFTS = 2
"""mlx-lm's default of ``num_draft_tokens``."""


class Verifier:
    """A model whose calls are cut where its cache, token by token, would store rows.

    So drafts on both sides of that see what they would see one by one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits ``[1, L, vocabulary]`` of tokens ``[1, L]``."""
        compressed, n_tokens = lowrank_cache(cache), tokens.shape[1]
        first = n_tokens if compressed is None else compressed.tokens_until_due(n_tokens)
        parts = [tokens[:, :first], tokens[:, first:]]
        logits = [self._model(part, cache=cache) for part in parts if part.size]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=1)


@dataclass
class DraftCount:
    """Of one answer, counted as its tokens come.

    Args:
        n_at_a_time: Tokens that are drafted at a time.
        max_tokens: Of the answer; near its end fewer are drafted.
    """

    n_at_a_time: int
    max_tokens: int
    n_tokens: int = 0
    n_taken: int = 0
    n_drafted: int = 0
    """Without those behind the answer's end."""
    _n_open: int = 0
    """Taken since the model's last own token."""

    def count(self, from_draft: bool) -> None:
        """Count a token of the answer; the model's own comes after what was drafted before it."""
        if from_draft:
            self._n_open += 1
            self.n_taken += 1
            self.n_drafted += 1
        else:
            begin = self.n_tokens - self._n_open
            self.n_drafted += min(self.n_at_a_time, self.max_tokens - begin) - self._n_open
            self._n_open = 0
        self.n_tokens += 1
