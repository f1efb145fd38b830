"""Choices of rows for tests of the Metal kernel, and what sorting by numpy chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.backend import MLXBackend


@dataclass(frozen=True)
class Choice:
    """Sizes of a choice, and what the scores are like."""

    n_rows: int
    count: int
    scores: str = "drawn"
    n_kv_heads: int = 2
    batch: int = 1

    def __str__(self) -> str:
        return f"L{self.n_rows}-best{self.count}-{self.scores}"


SMALL = Choice(200, 9, batch=2)
LONG = Choice(5003, 20)
MANY = replace(LONG, count=700)
FEW = replace(LONG, count=2, scores="negative")
TIES = replace(MANY, scores="ties")
ALL = Choice(289, 289)
"""The last row is a run of its own."""
FALLING = Choice(900, 2, "falling")
"""The first rows are the best."""


def draw_worth(choice: Choice, random: np.random.Generator) -> np.ndarray:
    """Scores of each KV head's rows, in float32."""
    shape = choice.batch, choice.n_kv_heads, choice.n_rows
    drawn = random.standard_normal(shape).astype(np.float32)
    few = random.integers(0, 4, shape)
    some_nan = np.full((), -1, np.int32).view(np.float32)
    numbers: dict[str, Any] = {
        "drawn": drawn,
        "falling": np.broadcast_to(-np.arange(choice.n_rows), shape),
        "negative": -1 - np.abs(drawn),
        "any-size": drawn * 10.0 ** random.integers(-30, 30, shape),
        "ties": few - 2,
        "equal": np.zeros(shape),
        "signed-zeros": np.where(few > 1, 0.0, -0.0),
        "lowest": np.where(few > 1, drawn, -np.inf),
        "infinite": np.choose(few, [drawn, -np.inf, np.inf, 0]),
        "nan": np.choose(few, [drawn, np.nan, -np.nan, some_nan]),
    }
    return numbers[choice.scores].astype(np.float32)


def draw(choice: Choice) -> tuple[mx.array, int]:
    """Arguments, the scores as an array of MLX."""
    worth = draw_worth(choice, np.random.default_rng(choice.n_rows))
    return mx.array(worth), choice.count


def expected(worth: mx.array, count: int) -> np.ndarray:
    """By a stable sort, the rows rising."""
    best = np.argsort(-np.array(worth), axis=-1, kind="stable")
    return np.sort(best[..., :count], axis=-1)


def is_possible(rows: np.ndarray, choice: Choice) -> bool:
    """Whether these are rows that there are, rising."""
    is_some = rows.min() >= 0 and rows.max() < choice.n_rows
    return bool(is_some and (np.diff(rows, axis=-1) > 0).all())


def is_right(metal: MLXBackend, choice: Choice) -> bool:
    """Whether the kernel chooses as sorting does, the path asserted; with NaN, any rows."""
    arguments = draw(choice)
    found = metal.choose_rows(*arguments)
    assert metal.kernels.last_path["choose_rows"] == "choose_rows"
    assert found.dtype == mx.int32
    got = np.array(found)
    assert got.shape == (choice.batch, choice.n_kv_heads, choice.count)
    if choice.scores == "nan":
        return is_possible(got, choice)
    return np.array_equal(got, expected(*arguments))
