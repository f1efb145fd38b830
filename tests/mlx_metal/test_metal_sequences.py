"""Several sequences in one launch of each Metal kernel, with planted faults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from tests.sequences import (
    PACKED,
    PLAIN,
    TRADITIONAL,
    attend_at_once,
    attend_each,
    error_at_once,
    make_sequences,
)
from xkv.backends.mlx_metal.kernels import attend_dense, common, index_scores
from xkv.checks.decode_cases import DTYPES
from xkv.checks.tolerances import TOLERANCE
from xkv.ops.index import n_columns
from xkv.ops.scores import Dense
from xkv.ops.sequences import Latents

pytest_plugins = ["tests.metal_device"]

KERNELS = ("attend_dense", "query_terms", "index_scores", "choose_rows", "key_scores", "weigh_rows")


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(
    "case", [PLAIN, PACKED, TRADITIONAL], ids=["plain", "packed", "traditional"]
)
def test_each_gets_what_it_gets_alone(metal, reference, case, n):
    error = error_at_once(metal, reference, case, "float32", n, has_sinks=n == 3)
    assert error < TOLERANCE["float32"]
    assert {name: metal.kernels.last_path[name] for name in KERNELS} == {x: x for x in KERNELS}


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
def test_sixteen_bits_give_what_they_give_alone(metal, case, dtype):
    # not what float64 does: an index in 16 bits prefers other rows of nearly the same worth
    each = make_sequences(metal, case, dtype, 4)
    assert np.array_equal(attend_at_once(metal, each), attend_each(metal, each))


def test_a_step_of_several_is_as_many_launches_as_of_one(emulated):
    counts = []
    for n in (1, 4):
        each = make_sequences(emulated, PACKED, "float16", n)
        attend = attend_each if n == 1 else attend_at_once
        with emulator.settings(checked=False):
            # the check at first use launches each once more
            attend(emulated, each)
            with emulator.settings(checked=False) as launches:
                attend(emulated, each)
        counts.append(len(launches))
    assert counts == [len(KERNELS)] * 2
    # what Metal allows
    assert max(launch.text.count("[[buffer(") for launch in launches) <= 31


def test_more_sequences_than_a_kernel_has_arguments_for_are_refused(metal):
    latent = make_sequences(metal, PACKED, "float32", 1)[0].segment.keys.latent
    five = Latents((latent,) * 5)
    n = n_columns(five)
    with pytest.raises(xkv.InputError, match="takes up to 4 sequences, not 5"):
        metal.index_scores(metal.normal((5, 3, n, 4), 1), five, metal.normal((5, 4), 2), 2)
    dense = [Dense(*(metal.normal((1, 2, 9, 64), seed) for seed in (1, 2)))] * 5
    with pytest.raises(xkv.InputError, match="takes up to 4 sequences, not 5"):
        metal.attend_dense(metal.normal((5, 8, 1, 64), 3), dense, None)


READ_PLAIN, READ_PACKED = (common, "_READ_PLAIN_EACH"), (common, "_READ_PACKED_EACH")
EACH, EACH_RECENT = (attend_dense, "EACH"), (attend_dense, "EACH_RECENT")
SCORES = (index_scores, "SOURCE")
LAST = "threadgroup_position_in_grid.z == 2"
# Name: a case, the source, the text of it that is replaced, by what, which occurrence.
FAULTS = {
    "rows-of-another-sequence": (PLAIN, READ_PLAIN, LAST + " ? latent_2 ", "false ? latent_2 ", 0),
    "length-of-another": (
        PLAIN,
        READ_PLAIN,
        LAST + " ? latent_2_shape",
        "true ? latent_2_shape",
        0,
    ),
    "longest-is-the-first": (PLAIN, READ_PLAIN, "latent_0_shape[1]", "latent_1_shape[1]", 1),
    "words-of-another-sequence": (PACKED, READ_PACKED, "words_1 :", "words_0 :", 0),
    "scales-of-another-sequence": (PACKED, READ_PACKED, "scales_1 :", "scales_0 :", 0),
    "biases-of-another-sequence": (PACKED, READ_PACKED, "biases_2 :", "biases_3 :", 0),
    "rows-there-are-not": (PLAIN, SCORES, "row < n_rows ? largest", "true ? largest", 0),
    "keys-of-another-sequence": (PLAIN, EACH, "keys_1 :", "keys_0 :", 0),
    "values-of-another-sequence": (PLAIN, EACH, "values_2 :", "values_0 :", 0),
    "rows-as-if-all-in-use": (PLAIN, EACH, "keys_1_shape[2]", "n_rows", 0),
    "a-row-not-in-use": (PLAIN, EACH, "n_used[batch]", "n_used[batch] + 1", 0),
    "as-many-rows-as-the-first": (PLAIN, EACH, "n_used[batch]", "n_used[0]", 0),
    "queries-of-the-first": (PLAIN, EACH, "(batch * n_heads + head)", "head", 0),
    "numbers-of-another-sequence": (PLAIN, EACH_RECENT, "numbers_1 :", "numbers_3 :", 0),
    "factors-of-another-sequence": (PLAIN, EACH_RECENT, "scales_1 :", "scales_3 :", 0),
    "recent-rows-of-another": (PLAIN, EACH_RECENT, "numbers_0_shape[2]", "numbers_2_shape[2]", 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, plant, name):
    case, place, old, new, occurrence = FAULTS[name]
    plant(place, old, new, occurrence)
    metal.kernels.check = lambda *args: None
    try:
        # nearly all rows of the shortest, and offsets by which rows of nothing would be worth more
        error = error_at_once(metal, reference, replace(case, n_rebuilt=60), "float32", 4)
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert not error < 10 * TOLERANCE["float32"], f"an error of {error:.1e} only"


def test_check_at_first_use_looks_at_several(emulated, reference, plant):
    plant(READ_PACKED, "words_1 :", "words_0 :")
    with pytest.raises(xkv.InputError, match="disagrees with its plain twin"):
        error_at_once(emulated, reference, PACKED, "float32", 2)
