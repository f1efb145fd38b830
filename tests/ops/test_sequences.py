"""Several sequences in one step, by plain operations: each gets what it gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.sequences import (
    PACKED,
    PLAIN,
    TRADITIONAL,
    attend_at_once,
    attend_each,
    error_at_once,
    make_sequences,
)
from xkv import load_backend
from xkv.checks.decode_cases import DTYPES
from xkv.ops import sequences
from xkv.ops.backend import Backend
from xkv.ops.sequences import Latents, side_by_side

CASES = [PLAIN, PACKED, TRADITIONAL]
BOUND = 5e-6
"""In float32; 8e-7 was measured."""


@pytest.fixture(scope="module")
def plain_mlx() -> Backend:
    return load_backend("mlx", kernels="off")


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=["plain", "packed", "traditional"])
def test_each_gets_what_it_gets_alone(plain_mlx, reference, case, n):
    error = error_at_once(plain_mlx, reference, case, "float32", n, has_sinks=n == 2)
    assert error < BOUND


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", CASES, ids=["plain", "packed", "traditional"])
def test_sixteen_bits_give_what_they_give_alone(plain_mlx, case, dtype):
    # not what float64 does: an index in 16 bits prefers other rows of nearly the same worth
    each = make_sequences(plain_mlx, case, dtype, 4)
    assert np.array_equal(attend_at_once(plain_mlx, each), attend_each(plain_mlx, each))


@pytest.mark.parametrize("case", CASES, ids=["plain", "packed", "traditional"])
def test_the_reference_does_so_exactly(reference, case):
    each = make_sequences(reference, case, "float32", 4, exact=True)
    got = attend_at_once(reference, each)
    assert np.abs(got - attend_each(reference, each)).max() < 1e-14


def rows_of_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv.ops.index.are_there", lambda b, n: b.xp.ones((len(n), max(n))) > 0)


def dense_rows_of_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_there(backend, each):
        return sequences.dense_together(backend, each)[0], None

    monkeypatch.setattr("xkv.ops.working_set.dense_together", all_there)


def sequences_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Latents.sequences
    monkeypatch.setattr(Latents, "sequences", property(lambda x: parts.fget(x)[::-1]))


def unused_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(backend, each):
        spread = [x._replace(n_used=x.n_used + 1) for x in each]
        return sequences.dense_together(backend, spread)

    monkeypatch.setattr("xkv.ops.working_set.dense_together", whole)


@pytest.mark.parametrize(
    "fault",
    [
        *(rows_of_others_count, dense_rows_of_others_count),
        *(sequences_change_places, unused_rows_count),
    ],
)
def test_planted_fault_is_caught(plain_mlx, reference, fault, monkeypatch):
    fault(monkeypatch)
    try:
        # with offsets, rows of nothing are worth more than others
        case = replace(PLAIN, n_rebuilt=60)
        error = error_at_once(plain_mlx, reference, case, "float32", 4)
    except (ValueError, IndexError):
        return
    assert not error < 10 * BOUND


@pytest.mark.parametrize("n_heads", [(), (2,)], ids=["latents", "rows"])
def test_sequences_stand_side_by_side(mlx_backend, n_heads):
    xp = mlx_backend.xp
    parts = [number * xp.ones((1, *n_heads, n, 3)) for number, n in ((1, 2), (2, 1), (3, 4))]
    found = mlx_backend.to_numpy(side_by_side(mlx_backend, parts))
    assert found.shape == (3, *n_heads, 4, 3)
    wanted = np.array([[1, 1, 0, 0], [2, 0, 0, 0], [3, 3, 3, 3]])
    wanted = wanted[:, None, :, None] if n_heads else wanted[..., None]
    assert np.array_equal(found, np.broadcast_to(wanted, found.shape))
    filled = side_by_side(mlx_backend, [xp.ones((2, *n_heads, 2, 3))], 3)
    assert (
        mlx_backend.to_numpy(filled).sum(axis=(-1, -2)).tolist()
        == np.full((2, *n_heads), 6).tolist()
    )
    assert side_by_side(mlx_backend, parts[:1]) is parts[0]
