"""The Metal kernel that chooses rows, with faults in its source, all of which must be caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from tests.mlx_metal.row_choices import (
    ALL,
    FALLING,
    FEW,
    LONG,
    MANY,
    SMALL,
    TIES,
    Choice,
    draw,
    expected,
    is_right,
)
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import choose_rows, selection

pytest_plugins = ["tests.metal_device"]

SOURCE, HEADER = (choose_rows, "SOURCE"), (choose_rows, "HEADER")
SELECTION = (selection, "SELECTION_SOURCE")
EQUAL = replace(TIES, scores="equal")
# Name: a choice, the source, the text of it that is replaced, by what.
FAULTS = {
    "scores-of-another-head": (SMALL, SOURCE, "worth + kv_head * n_rows", "worth"),
    "maxima-of-another-head": (SMALL, SOURCE, "maxima + kv_head * n_runs", "maxima"),
    "rows-for-another-head": (SMALL, SOURCE, "out[kv_head * count +", "out["),
    "last-row-missing": (ALL, SOURCE, "row + i < n_rows", "row + i < n_rows - 1"),
    "rows-past-the-end": (FEW, SOURCE, "if (row + i < n_rows) largest", "largest"),
    "maximum-of-half-a-run": (FEW, SOURCE, "n_lanes < RUN / 4", "n_lanes < RUN / 8"),
    "maximum-of-the-last": (FEW, SOURCE, "max(largest, key_of(x[i]))", "key_of(x[i])"),
    "last-run-missing": (ALL, SOURCE, "n_runs, count,", "n_runs - 1, count,"),
    "a-run-too-few": (FEW, SOURCE, "count, runs", "count - 1, runs"),
    "a-run-not-looked-at": (FEW, SOURCE, "n_best * RUN", "(n_best - 1) * RUN"),
    "a-row-too-few": (SMALL, SOURCE, "count, found", "count - 1, found"),
    "rows-not-written": (SMALL, SOURCE, "thread_index < count", "thread_index < count - 1"),
    "numbers-of-runs": (SMALL, SOURCE, "rows.row(found[thread_index])", "found[thread_index]"),
    "negative-upside-down": (SMALL, HEADER, "? ~bits", "? bits"),
    "zero-above-zero": (replace(TIES, scores="signed-zeros"), HEADER, "x == 0.0f ? 0.0f : x", "x"),
    "nan-is-none": (replace(ALL, scores="nan"), HEADER, "1u, ~1u", "0u, ~0u"),
    "row-of-the-next-head": (replace(SMALL, count=180), HEADER, "at < n_rows ?", "true ?"),
    "first-row-of-the-run": (SMALL, HEADER, " + i % RUN", ""),
    "smallest-key": (LONG, SELECTION, "if (key) low = min", "low = max"),
    "largest-key": (LONG, SELECTION, "high = max(high, key)", "high = max(high, key / 2)"),
    "bins-not-cleared": (LONG, SELECTION, "shared.bins[thread_index] = 0;", ""),
    "bins-too-narrow": (LONG, SELECTION, "max(0, 1 +", "max(0, 0 +"),
    "bins-from-the-lowest": (LONG, SELECTION, "THREADS - 1 - thread", "thread"),
    "bin-before": (LONG, SELECTION, "n_in_bin >= n_left", "n_in_bin > n_left"),
    "all-of-the-bin": (MANY, SELECTION, "n_within > n_left", "n_within > n_left + 900"),
    "range-of-two-bins": (MANY, SELECTION, "(1u << shift) - 1)", "(2u << shift) - 1)"),
    "wanted-twice": (MANY, SELECTION, "n_left -= shared.n_before;", ""),
    "a-tie-too-many": (TIES, SELECTION, "(is_tie && ties_before < n_left)", "is_tie"),
    "last-ties": (EQUAL, SELECTION, "ties_before < n_left)", "ties_before + n_left >= n_keys)"),
    "ties-of-a-chunk": (TIES, SELECTION, "n_ties += n.all", "n_ties = n.all"),
    "those-above-of-a-chunk": (MANY, SELECTION, "n_above += n.all", "n_above = n.all"),
    "ties-over-others": (TIES, SELECTION, "+ min(ties_before, n_left)] = i", "] = i"),
    "sum-without-the-last-lane": (LONG, SELECTION, "] = before + n;", "] = before;"),
    "sum-of-the-next": (LONG, SELECTION, "exclusive_sum(total)", "inclusive_sum(total)"),
}


def is_caught(metal: MLXBackend, choice: Choice) -> bool:
    """Whether the kernel is wrong, or stopped by the emulator, the source being at fault."""
    try:
        return not is_right(metal, choice)
    except emulator.MetalKernelError as error:
        return error.kind != "compile"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, plant, name):
    choice, *fault = FAULTS[name]
    metal.kernels.check = lambda *args: None
    assert not is_caught(metal, choice)
    plant(*fault)
    assert is_caught(metal, choice)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BARRIERS = [
    *[(SOURCE, BARRIER, i) for i in range(choose_rows.SOURCE.count(BARRIER))],
    *[(SELECTION, BARRIER, i) for i in range(selection.SELECTION_SOURCE.count(BARRIER))],
    (SOURCE, "threadgroup_barrier(mem_flags::mem_device);", 0),
]


@pytest.mark.parametrize(("place", "barrier", "i"), BARRIERS, ids=str)
def test_missing_barrier_is_caught(emulated, plant, place, barrier, i):
    emulated.kernels.check = lambda *args: None
    plant(place, barrier, "", i)
    assert is_caught(emulated, FALLING) or is_caught(emulated, TIES)


def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant):
    given = draw(Choice(300, 20, n_kv_heads=1))
    plant(*FAULTS["scores-of-another-head"][1:])
    assert np.array_equal(choose_rows.KERNEL(*given), expected(*given))
    with pytest.raises(xkv.InputError, match="choose_rows disagrees with its plain twin"):
        emulated.choose_rows(*given)
