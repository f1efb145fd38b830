"""Beside a cache: its exact twin, comparisons, and operations that fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.cache.lowrank_cache import LowRankCache

FAILING = (
    *("evaluate", "own", "eigh", "cholesky"),
    *("quantize", "rope", "top_indices", "put_along"),
)
"""Operations that fail in turn."""


@dataclass
class Pair:
    """A cache and what a full cache would hold: rows ``[B, n_kv_heads, L, head_dim]`` a layer."""

    cache: LowRankCache
    keys: list[np.ndarray]
    values: list[np.ndarray]
    topics: np.ndarray
    """What each token is about."""

    @property
    def n_tokens(self) -> int:
        return len(self.topics)


def row_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error of all rows."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6))


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, attended: np.ndarray, scale: float
) -> np.ndarray:
    """In float64: ``[B, n_heads, Lq, dim]``; ``attended`` is ``[B, n_kv_heads, Lq, L]``."""
    n_shared = queries.shape[1] // keys.shape[1]
    keys, values, attended = (np.repeat(x, n_shared, axis=1) for x in (keys, values, attended))
    scores = np.einsum("bhqd,bhkd->bhqk", queries.astype(np.float64), keys) * scale
    scores = np.where(attended, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), values)


def ordered(cache: LowRankCache) -> list[Any]:
    """Handles in the order in which a file has them."""
    return list(cache.layers.values())


def state_of(cache: LowRankCache) -> list[Any]:
    """Every group's state."""
    return [group.state for group in cache.groups]


def same_state(first: Any, second: Any) -> bool:
    """Whether two states are equal, their arrays bit by bit."""
    if first is second:
        return True
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    if hasattr(first, "__dataclass_fields__"):
        return all(
            same_state(getattr(first, name), getattr(second, name))
            for name in first.__dataclass_fields__
        )
    if hasattr(first, "shape") and hasattr(second, "shape"):
        if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
            return False
        return bool(((first == second) | (first != first) & (second != second)).all())
    return bool(first == second)


class failing:
    """The ``at``-th operation of a backend raises, while the block runs."""

    def __init__(self, backend: Any, at: int, kind: type[BaseException]) -> None:
        self.backend, self.left, self.kind = backend, at, kind
        self.has_failed = False

    def __enter__(self) -> Callable[[], bool]:
        for name in FAILING:
            vars(self.backend)[name] = self._wrapped(getattr(self.backend, name))
        return lambda: self.has_failed

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if not self.left:
                self.has_failed = True
                raise self.kind("the operation was ended")
            return original(*args, **kwargs)

        return operation

    def __exit__(self, *exc: object) -> None:
        for name in FAILING:
            del vars(self.backend)[name]
