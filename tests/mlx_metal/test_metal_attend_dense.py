"""The Metal kernel that attends to dense rows, against the reference and with planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from tests.mlx_metal.dense_rows import (
    CASE,
    WIDE,
    Arguments,
    error_of,
    far_arguments,
    make_arguments,
)
from xkv.backends.mlx_metal.kernels import attend_dense
from xkv.checks.decode_cases import CASES, DTYPES
from xkv.checks.tolerances import TOLERANCE
from xkv.ops.recent import Recent
from xkv.ops.scores import Dense

pytest_plugins = ["tests.metal_device"]

MOST_THREADGROUP_BYTES = 17_000
"""Of the 32 KiB that a threadgroup may have."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_dense_is_right(metal, reference, case, dtype):
    arguments = make_arguments(metal, case, dtype)
    assert error_of(metal, reference, arguments) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASE], ids=str)
def test_attend_dense_takes_sinks(metal, reference, case, dtype):
    arguments = make_arguments(metal, case, dtype, has_sinks=True)
    assert error_of(metal, reference, arguments) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [CASE, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_attend_dense_does_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        arguments = make_arguments(emulated, case, "float16", has_sinks=True)
        assert error_of(emulated, reference, arguments) < TOLERANCE["float16"]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 400])
@pytest.mark.parametrize("case", [CASE, WIDE], ids=["narrow", "wide"])
def test_attend_dense_takes_any_number_of_rows(metal, reference, case, n):
    case = replace(case, n_heads=2, n_dense=n, n_queries=min(n, 3), batch=1)
    arguments = make_arguments(metal, case, "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize("n", [0, 2, 15, 16, 17, 31, 32, 33, 64, 65, 400])
@pytest.mark.parametrize("case", [CASE, WIDE], ids=["narrow", "wide"])
def test_attend_dense_takes_any_number_of_recent_rows(metal, reference, case, n):
    case = replace(case, n_rows=420, n_recent=n, n_rebuilt=1)
    arguments = make_arguments(metal, case, "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_queries"),
    [(1, 1, 1), (2, 2, 4), (7, 1, 1), (14, 2, 5), (8, 8, 1), (32, 4, 2), (2, 1, 64)],
)
def test_attend_dense_takes_any_queries(metal, reference, n_heads, n_kv_heads, n_queries):
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_queries": n_queries}
    arguments = make_arguments(metal, replace(CASE, batch=1, **heads), "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_may_be_of_another_dtype(metal, reference, dtype):
    queries, dense, sinks = make_arguments(metal, CASE, "float32", has_sinks=True)
    arguments = queries, dense, sinks.astype(getattr(mx, dtype))
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


def test_attend_dense_takes_any_strides(metal):
    queries, dense, sinks = make_arguments(metal, CASE, "float16", has_sinks=True)
    want = attend_dense.KERNEL(queries, dense, sinks)

    def reordered(x: mx.array, first: int, second: int) -> mx.array:
        return mx.contiguous(x.swapaxes(first, second)).swapaxes(first, second)

    views = (
        reordered(queries, 1, 2),
        Dense(
            reordered(dense.keys, 2, 3),
            mx.repeat(dense.values, 2, axis=3)[..., ::2],
            None,
            dense.recent.map(lambda x: reordered(x, 2, 3)),
        ),
        mx.repeat(sinks, 2)[::2],
    )
    got = attend_dense.KERNEL(*views)
    assert all(mx.array_equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [-128.0, 128.0])
def test_scores_may_be_of_any_size(metal, reference, size):
    assert error_of(metal, reference, far_arguments(metal, size)) < TOLERANCE["float32"]


def test_sums_are_in_float32(metal):
    # a half that has reached 2,048 stays there when 1 is added
    n = 70_000
    dense = Dense(mx.zeros((1, 1, n, 64), mx.float16), mx.full((1, 1, n, 64), 1.25, mx.float16))
    output, totals = metal.attend_dense(mx.zeros((1, 1, 1, 64), mx.float16), dense, None)
    assert output.tolist() == mx.full((1, 1, 1, 64), 1.25).tolist()
    assert totals.item() == pytest.approx(np.log(n), abs=1e-5)


def _refused(**changes: Any) -> Arguments:
    """Arguments of which one thing is refused."""
    given = {"queries": mx.float16, "keys": mx.float16, "values": mx.float16} | changes
    n_queries, n_rows, dim = (given.get(x, y) for x, y in (("L", 1), ("D", 9), ("dim", 64)))
    rows = mx.zeros((1, 1, n_rows, dim), given["keys"])
    values = mx.zeros((1, 1, n_rows, given.get("value_dim", dim)), given["values"])
    dense = Dense(rows, values, given.get("n_used"))
    if "recent" in given:
        numbers = mx.zeros((1, 1, 9, 2 * dim), given["recent"])
        recent = Recent(numbers, mx.zeros((1, 1, 9, 2)))
        dense = dense._replace(recent=recent.map(lambda x: x[:, :, : given.get("K", 9)]))
    sinks = mx.zeros((1,), given["sinks"]) if "sinks" in given else None
    return mx.zeros((1, 1, n_queries, dim), given["queries"]), dense, sinks


REFUSED = {
    "dtypes": ({"keys": mx.float32}, "queries float16, keys float32, values float16"),
    "dtype": ({x: mx.int8 for x in ("queries", "keys", "values")}, "bfloat16, not int8"),
    "dtype-of-sinks": ({"sinks": mx.int32}, "float32, float16, bfloat16, not int32"),
    "head-dim": ({"dim": 80}, "head_dim 64, 128, 256, not 80"),
    "value-dim": ({"value_dim": 128}, "values as wide as keys, 64, not 128"),
    "few-rows": ({"L": 3, "D": 2}, "as many dense rows as queries or more, not 2"),
    "no-rows": ({"D": 0}, "as many dense rows as queries or more, not 0"),
    "recent-in-16-bits": ({"recent": mx.int16}, "recent rows in int8, not int16"),
    "few-recent": ({"recent": mx.int8, "K": 3}, "arrays of 8 elements or more, not 6"),
    "unused-rows": ({"n_used": mx.array([3])}, "dense rows whose number the host knows"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(changes, sentence):
    assert attend_dense.KERNEL.why_not(*_refused()) is None
    assert sentence in attend_dense.KERNEL.why_not(*_refused(**changes))


def test_one_kernel_takes_all_sizes(emulated):
    fewer = replace(CASE, n_heads=7, n_kv_heads=1, n_dense=9, n_queries=1, batch=1)
    given = [make_arguments(emulated, case, "float16") for case in (CASE, fewer)]
    with emulator.settings() as launches:
        for arguments in given:
            attend_dense.KERNEL(*arguments)
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1


@pytest.mark.parametrize("head_dim", attend_dense.HEAD_DIMS)
def test_threadgroup_memory_is_bounded(emulated, head_dim):
    case = replace(CASE, head_dim=head_dim, n_heads=2, batch=1)
    arguments = make_arguments(emulated, case, "float32")
    with emulator.settings() as launches:
        attend_dense.KERNEL(*arguments)
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES
