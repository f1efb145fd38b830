"""The Metal kernel that chooses rows, against sorting by numpy."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from tests.mlx_metal.row_choices import (
    ALL,
    FALLING,
    LONG,
    MANY,
    SMALL,
    TIES,
    Choice,
    draw,
    is_right,
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
    got = metal.choose_rows(*choice_of(metal, make_inputs(metal, case, "float32")))
    assert metal.kernels.last_path["choose_rows"] == "choose_rows"
    given = choice_of(reference, make_inputs(reference, case, "float32"))
    assert np.array_equal(np.array(got), np.sort(reference.choose_rows(*given), axis=-1))


@pytest.mark.parametrize(
    "n_rows", [8, 9, 15, 16, 17, 33, 255, 1023, 1025, 4095, 4096, 4097, 16_383, 16_384, 16_401]
)
def test_choose_rows_takes_any_number_of_rows(metal, n_rows):
    assert is_right(metal, Choice(n_rows, min(40, n_rows - 3)))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64, 511, 1023, 1024])
def test_choose_rows_takes_any_number_to_choose(metal, count):
    assert is_right(metal, Choice(2500, count))


@pytest.mark.parametrize("n_rows", [8, 15, 16, 17, 300, 1023, 1024])
def test_choose_rows_takes_all_rows(metal, n_rows):
    assert is_right(metal, Choice(n_rows, n_rows))


@pytest.mark.parametrize(
    "scores",
    ["negative", "any-size", "ties", "equal", "signed-zeros", "lowest", "infinite", "nan"],
)
@pytest.mark.parametrize("size", [SMALL, LONG, MANY, ALL], ids=str)
def test_choose_rows_takes_any_scores(metal, size, scores):
    assert is_right(metal, replace(size, scores=scores))


@pytest.mark.parametrize("choice", [SMALL, LONG, TIES, FALLING], ids=str)
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_choose_rows_does_not_depend_on_the_schedule(emulated, schedule, choice):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert is_right(emulated, choice)


def with_sizes(n_rows: int, count: int) -> tuple[mx.array, int]:
    """Arguments of zeros."""
    return mx.zeros((1, 1, n_rows)), count


REFUSED = {
    "float16": ((mx.zeros((1, 1, 9), mx.float16), 1), "float32, not float16"),
    "no-rows": (with_sizes(300, 0), "1 to 1024 rows, not 0"),
    "many-rows": (with_sizes(9999, 1025), "1 to 1024 rows, not 1025"),
    "few-rows": (with_sizes(8, 9), "choose 9 of 8 rows"),
    "few-numbers": (with_sizes(7, 1), "or more, not 7"),
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
