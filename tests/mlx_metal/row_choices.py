"""Choices of rows for tests of the Metal kernel, and what sorting by numpy chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import choose_rows
from xkv.ops import working_set


@dataclass(frozen=True)
class Choice:
    """Sizes of a choice, and what the scores are like."""

    n_rows: int
    n_rebuilt: int
    n_kept: int = 0
    n_swapped: int = 0
    scores: str = "drawn"
    n_kv_heads: int = 2
    batch: int = 1

    def __str__(self) -> str:
        kept = f"kept{self.n_kept}-swapped{self.n_swapped}"
        return f"L{self.n_rows}-best{self.n_rebuilt}-{kept}-{self.scores}"


SMALL = Choice(200, 9, 20, 5, batch=2)
LONG = Choice(5003, 20, 60, 12)
MANY = replace(LONG, n_rebuilt=700)
FEW = replace(LONG, n_rebuilt=2, n_swapped=2, scores="negative")
TIES = replace(MANY, scores="ties")
ALL = Choice(289, 269, 20, 5)
"""The last row is a run of its own."""
FALLING = Choice(900, 2, 60, 2, "falling")
"""The first rows are the best, and kept."""
FEW_RUNS = Choice(1600, 20, 1570, 3, "falling")
"""All runs but two have kept rows only."""
COLLIDING = Choice(60_000, 50, 60, 12, "colliding", n_kv_heads=1)
"""Of the best rows, which belong into five slots of the table of kept rows, its end among them."""


def slots_of(rows: np.ndarray) -> np.ndarray:
    """Where the table of kept rows has each row's slot."""
    return rows.astype(np.uint64) * 2654435769 % 2**32 // (2**32 // choose_rows.SLOTS)


def colliding_rows(n_rows: int) -> np.ndarray:
    """Rows that belong into the last four slots of the table, or its first."""
    rows = np.arange(n_rows)
    return rows[(slots_of(rows) + 4) % choose_rows.SLOTS < 5]


def draw_worth(choice: Choice, random: np.random.Generator) -> np.ndarray:
    """Scores of each KV head's rows, in float32."""
    shape = choice.batch, choice.n_kv_heads, choice.n_rows
    drawn = random.standard_normal(shape).astype(np.float32)
    few = random.integers(0, 4, shape)
    rows = np.arange(choice.n_rows)
    some_nan = np.full((), -1, np.int32).view(np.float32)
    numbers: dict[str, Any] = {
        "drawn": drawn,
        "colliding": np.where(np.isin(rows, colliding_rows(choice.n_rows)), 9 + drawn, drawn),
        "falling": np.broadcast_to(-rows, shape),
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


def draw_kept(choice: Choice, worth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Every second of the best rows, and others; some of those that collide; or the best."""
    best = np.argsort(-worth, axis=-1)
    if choice.scores == "falling":
        return best[..., : choice.n_kept][..., ::-1].astype(np.int32)
    if choice.scores == "colliding":
        few = random.permutation(colliding_rows(choice.n_rows))[None, None]
    else:
        others = random.permuted(best[..., 1::2], axis=-1)
        few = np.concatenate([best[..., ::2], others], axis=-1)
    return random.permuted(few[..., : choice.n_kept], axis=-1).astype(np.int32)


def draw(choice: Choice) -> tuple[Any, ...]:
    """Arguments, as arrays of MLX."""
    random = np.random.default_rng(choice.n_rows)
    worth = draw_worth(choice, random)
    kept = mx.array(draw_kept(choice, worth, random)) if choice.n_kept else None
    return mx.array(worth), kept, choice.n_rebuilt, choice.n_swapped


def together(chosen: working_set.Choice) -> np.ndarray:
    """Rows, then slots; those that enter are the first rows, or they are -1."""
    rows, *swaps = (np.array(x) for x in chosen if x is not None)
    if not swaps:
        return rows
    entering, slots = swaps
    if not np.array_equal(entering, rows[..., : entering.shape[-1]]):
        rows = rows * 0 - 1
    return np.concatenate([rows, slots], axis=-1)


def expected(
    worth: mx.array, kept_rows: mx.array | None, n_rebuilt: int, n_swapped: int
) -> np.ndarray:
    """By stable sorts."""
    scores, kept = np.array(worth), None if kept_rows is None else np.array(kept_rows)
    found = []
    for head in np.ndindex(*scores.shape[:2]):
        rows, slots = np.arange(scores.shape[-1]), np.zeros(0, np.int64)
        if kept is not None:
            rows = np.setdiff1d(rows, kept[head])
            slots = np.argsort(scores[head][kept[head]], kind="stable")[:n_swapped]
        best = rows[np.argsort(-scores[head][rows], kind="stable")[:n_rebuilt]]
        found.append(np.concatenate([best, slots]))
    return np.array(found).reshape(*scores.shape[:2], -1)


def is_possible(got: np.ndarray, choice: Choice, kept_rows: mx.array) -> bool:
    """Whether rows and slots are distinct ones that there are, and no row is kept."""
    n_rebuilt, n_swapped = choice.n_rebuilt, choice.n_swapped
    for head in np.ndindex(*got.shape[:2]):
        rows, slots = np.split(got[head], [n_rebuilt])
        others = np.setdiff1d(np.arange(choice.n_rows), np.array(kept_rows)[head])
        is_some = np.isin(rows, others).all() and np.isin(slots, np.arange(choice.n_kept)).all()
        is_once = len(np.unique(rows)) == n_rebuilt and len(np.unique(slots)) == n_swapped
        if not (is_some and is_once):
            return False
    return True


def is_right(metal: MLXBackend, choice: Choice) -> bool:
    """Whether the kernel chooses as sorting does, the path asserted; with NaN, in any order."""
    arguments = draw(choice)
    found = metal.choose_rows(*arguments)
    assert metal.kernels.last_path["choose_rows"] == "choose_rows"
    assert all(x is None or x.dtype == mx.int32 for x in found)
    got = together(found)
    if choice.scores == "nan":
        return is_possible(got, choice, arguments[1])
    return np.array_equal(got, expected(*arguments))
