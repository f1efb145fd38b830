"""The Metal kernel that chooses rows, against sorting by numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from tests.mlx_metal.row_choices import (
    ALL,
    COLLIDING,
    FALLING,
    FEW_RUNS,
    LONG,
    MANY,
    SMALL,
    TIES,
    Choice,
    draw,
    expected,
    is_right,
    slots_of,
    together,
)
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import choose_rows
from xkv.checks.decode_cases import CASES, make_inputs
from xkv.checks.operations import choice_of
from xkv.ops.backend import Backend

pytest_plugins = ["tests.metal_device"]

MOST_THREADGROUP_BYTES = 30_000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_choose_rows_is_what_the_twin_chooses(metal: MLXBackend, reference: Backend, case):
    worth, kept, n_rebuilt, *rest = choice_of(metal, make_inputs(metal, case, "float32"))
    got = together(metal.choose_rows(worth, kept, n_rebuilt, *rest))
    assert metal.kernels.last_path["choose_rows"] == "choose_rows"
    given = choice_of(reference, make_inputs(reference, case, "float32"))
    want = together(reference.choose_rows(*given))
    if kept is None:
        want = np.take_along_axis(
            want, np.argsort(-np.take_along_axis(np.array(worth), want, -1), axis=-1), -1
        )
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "n_rows", [8, 9, 15, 16, 17, 33, 255, 1023, 1025, 4095, 4096, 4097, 16_383, 16_384, 16_401]
)
def test_choose_rows_takes_any_number_of_rows(metal, n_rows):
    assert is_right(metal, Choice(n_rows, min(40, n_rows - 3), 3, 2))


@pytest.mark.parametrize("n_rebuilt", [1, 15, 16, 17, 64, 511, 1023, 1024])
def test_choose_rows_takes_any_number_to_rebuild(metal, n_rebuilt):
    assert is_right(metal, Choice(2500, n_rebuilt, 70, min(n_rebuilt, 17)))


@pytest.mark.parametrize("n_kept", [0, 1, 3, 4, 7, 8, 33, 1023, 1024, 1025, 2047, 2048])
def test_choose_rows_takes_any_number_of_kept_rows(metal, n_kept):
    assert is_right(metal, Choice(3000, 100, n_kept, min(n_kept, 32)))


@pytest.mark.parametrize("n_swapped", [0, 1, 31, 32, 33, 500])
def test_choose_rows_takes_any_number_of_swaps(metal, n_swapped):
    assert is_right(metal, Choice(2500, 600, 500, n_swapped))


@pytest.mark.parametrize("n_kept", [5, 1000, 2000])
def test_choose_rows_takes_all_that_are_not_kept(metal, n_kept):
    n_rows = n_kept + 300
    assert is_right(metal, Choice(n_rows, 300, n_kept, 1))


def test_runs_may_have_kept_rows_only(metal):
    assert is_right(metal, FEW_RUNS)


def test_rows_that_share_a_slot_are_told_apart(metal):
    worth, kept = map(np.array, draw(COLLIDING)[:2])
    # more of the best than are kept
    assert (worth > 5).sum() > COLLIDING.n_kept + 9
    assert set(slots_of(kept).flat) == {0, *range(choose_rows.SLOTS - 4, choose_rows.SLOTS)}
    assert is_right(metal, COLLIDING)


def test_no_kept_rows_are_none(metal):
    worth, _, n_rebuilt, *rest = draw(Choice(300, 40))
    got = metal.choose_rows(worth, mx.zeros((1, 2, 0), mx.int32), n_rebuilt, *rest)
    assert np.array_equal(together(got), expected(worth, None, n_rebuilt, *rest))


@pytest.mark.parametrize(
    "scores",
    ["negative", "any-size", "ties", "equal", "signed-zeros", "lowest", "infinite", "nan"],
)
@pytest.mark.parametrize("size", [SMALL, LONG, MANY, ALL], ids=str)
def test_choose_rows_takes_any_scores(metal, size, scores):
    assert is_right(metal, replace(size, scores=scores))


@pytest.mark.parametrize("choice", [SMALL, LONG, TIES, FALLING, COLLIDING], ids=str)
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_choose_rows_does_not_depend_on_the_schedule(emulated, schedule, choice):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert is_right(emulated, choice)


def with_sizes(n_rows: int = 300, n_kept: int = 20, n_rebuilt: int = 9, n_swapped: int = 2) -> Any:
    """Arguments of zeros."""
    kept = mx.zeros((1, 1, n_kept), mx.int32)
    return mx.zeros((1, 1, n_rows)), kept, n_rebuilt, n_swapped


REFUSED = {
    "float16": ((mx.zeros((1, 1, 9), mx.float16), None, 1, 0), "float32, not float16"),
    "no-rows": (with_sizes(n_rebuilt=0), "1 to 1024 rows, not 0"),
    "many-rows": (with_sizes(n_rows=9999, n_rebuilt=1025), "1 to 1024 rows, not 1025"),
    "many-kept": (with_sizes(n_rows=9999, n_kept=2049), "up to 2048 kept rows, not 2049"),
    "few-others": (with_sizes(n_rows=28), "choose 9 of 8 rows that are not kept"),
    "few-kept": (with_sizes(n_swapped=21), "choose 21 of 20 kept rows"),
    "few-entering": (with_sizes(n_swapped=10), "10 of 9 rows cannot enter"),
    "none-kept": ((mx.zeros((1, 1, 9)), None, 1, 1), "choose 1 of 0 kept rows"),
    "few-numbers": (with_sizes(n_rows=7, n_kept=1, n_rebuilt=1, n_swapped=1), "or more, not 7"),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(arguments, sentence):
    assert sentence in choose_rows.KERNEL.why_not(*arguments)


def test_one_kernel_takes_all_sizes(emulated):
    with emulator.settings() as launches:
        for choice in (SMALL, LONG, TIES):
            choose_rows.KERNEL(*draw(choice))
    assert len(launches) == 3
    assert len({(launch.name, launch.text) for launch in launches}) == 1
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES
