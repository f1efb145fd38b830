"""The Metal kernel that attends to dense rows, against the reference and with planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import attend_dense
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.scores import Dense
from xkv.ops.slots import Slots

pytest_plugins = ["tests.metal_device"]

CASE = DecodeCase(90, 8, 2, 64, 8, 8, n_dense=70, n_kept=45, n_queries=3, batch=2)
"""Three dense rows for some simdgroups, two for the others; and two slots, or one."""
WIDE = replace(CASE, head_dim=256)
"""Half the simdgroups."""
MOST_THREADGROUP_BYTES = 17_000
"""Of the 32 KiB that a threadgroup may have."""

Arguments = tuple[Any, Dense, Any]


def make_arguments(
    metal: MLXBackend, case: DecodeCase, dtype: str, has_sinks: bool = False
) -> Arguments:
    """The kernel's; the rows are views of buffers that go on with NaN, or with large numbers."""
    x = make_inputs(metal, case, dtype)

    def view(rows: mx.array) -> mx.array:
        worst = 100 if rows.dtype == mx.int8 else mx.nan
        spare = mx.full((*rows.shape[:2], 5, rows.shape[3]), worst, rows.dtype)
        return mx.concatenate([rows, spare], axis=2)[..., : rows.shape[2], :]

    sinks = metal.normal((case.n_heads,), 5) * 2 + 3
    slots = x.dense.slots
    if slots is not None:
        slots = Slots(*map(view, slots[:2]), slots.rows)
    dense = Dense(view(x.dense.keys), view(x.dense.values), None, slots)
    return x.queries * x.scale, dense, sinks.astype(x.queries.dtype) if has_sinks else None


def expected(metal: MLXBackend, reference: Backend, arguments: Arguments) -> list[np.ndarray]:
    """In float64, of the same rounded inputs."""

    def exact(x: Any) -> Any:
        return reference.from_numpy(metal.to_numpy(x).astype(np.float64))

    queries, dense, sinks = arguments
    slots = None if dense.slots is None else Slots(*map(exact, dense.slots))
    rows = Dense(exact(dense.keys), exact(dense.values), None, slots)
    want = reference.attend_dense(exact(queries), rows, None if sinks is None else exact(sinks))
    return [reference.to_numpy(x) for x in want]


def error_of(metal: MLXBackend, reference: Backend, arguments: Arguments) -> float:
    """Relative error of the kernel, the larger of both outputs', the path asserted."""
    got = metal.attend_dense(*arguments)
    assert metal.kernels.last_path["attend_dense"] == "attend_dense"
    assert [x.dtype for x in got] == [arguments[0].dtype, mx.float32]
    want = expected(metal, reference, arguments)
    return max(relative_error(metal.to_numpy(x), y) for x, y in zip(got, want, strict=True))


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
def test_attend_dense_takes_any_number_of_slots(metal, reference, case, n):
    case = replace(case, n_rows=420, n_kept=n, n_rebuilt=1)
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
            Slots(*(reordered(x, 2, 3) for x in dense.slots[:2]), dense.slots.rows),
        ),
        mx.repeat(sinks, 2)[::2],
    )
    got = attend_dense.KERNEL(*views)
    assert all(mx.array_equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [-128.0, 128.0])
def test_scores_may_be_of_any_size(metal, reference, size):
    queries, dense, _ = make_arguments(metal, replace(CASE, n_kept=0), "float32")
    # a feature of its own moves all scores alike
    queries[..., 0], dense.keys[..., 0] = size, 1
    arguments = queries, dense, mx.full((CASE.n_heads,), size + 2)
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


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
    if "slots" in given:
        numbers = mx.zeros((1, 1, 9, 2 * dim), given["slots"])
        n_slots = given.get("K", 9)
        scales, kept = mx.zeros((1, 1, n_slots, 2)), mx.zeros((1, 1, n_slots), mx.int32)
        dense = dense._replace(slots=Slots(numbers[:, :, :n_slots], scales, kept))
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
    "slots-of-16-bits": ({"slots": mx.int16}, "slots in int8, not int16"),
    "few-slots": ({"slots": mx.int8, "K": 3}, "arrays of 8 elements or more, not 6"),
    "unused-rows": ({"n_used": mx.array([3])}, "dense rows that are all in use"),
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


BEGIN, SINKS, SLOTS, ROWS, HEADER = (
    (attend_dense, name) for name in ("BEGIN", "SINKS", "SLOTS", "ROWS", "HEADER")
)
SEEN, SHRUNK = "n_rows - n_queries + query + 1", "fast::exp(mine.largest - most)"
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "last-row-not-seen": (CASE, ROWS, "row < n_seen", "row < n_seen - 1"),
    "row-past-the-last": (CASE, ROWS, "row < n_seen", "row <= n_seen"),
    "first-row-not-seen": (CASE, ROWS, "row = sg;", "row = max(sg, 1);"),
    "rows-twice": (CASE, ROWS, "row += SIMDGROUPS", "row += SIMDGROUPS / 2"),
    "queries-see-all-rows": (CASE, BEGIN, SEEN, "n_rows"),
    "queries-see-the-first's-rows": (CASE, BEGIN, SEEN, "n_rows - n_queries + 1"),
    "keys-of-another-head": (CASE, BEGIN, "kv_head * keys", "(1 - kv_head) * keys"),
    "values-of-another-head": (CASE, BEGIN, "kv_head * values", "(1 - kv_head) * values"),
    "keys-as-if-copied": (CASE, BEGIN, "kv_head * keys_strides[1]", "kv_head * n_rows * N"),
    "values-as-if-copied": (CASE, BEGIN, "kv_head * values_strides[1]", "kv_head * n_rows * N"),
    "keys-of-another-batch": (CASE, BEGIN, "keys + batch", "keys + 0"),
    "values-of-another-batch": (CASE, BEGIN, "values + batch", "values + 0"),
    "queries-of-another-batch": (CASE, BEGIN, "queries + batch", "queries + 0"),
    "queries-of-another-head": (CASE, BEGIN, "+ head * q", "+ (head ^ 1) * q"),
    "first-query-again": (CASE, BEGIN, "query * queries_strides[2]", "0"),
    "heads-of-another-group": (CASE, BEGIN, "head / (n_heads / keys_", "head % (keys_"),
    "next-values": (CASE, ROWS, "value + row * values", "value + (row + 1) % n_rows * values"),
    "first-feature-again": (CASE, HEADER, "fma(x[i], y[i], sum)", "fma(x[i], y[0], sum)"),
    "features-of-another-lane": (CASE, BEGIN, "feature * values_strides[3]", "(feature ^ 2)"),
    "a-lane's-score": (CASE, HEADER, "return simd_sum(sum);", "return sum;"),
    "total-not-shrunk": (CASE, HEADER, "fma(total, shrink,", "fma(total, 1.0f,"),
    "sums-not-shrunk": (CASE, HEADER, "fma(sums[i], shrink,", "fma(sums[i], 1.0f,"),
    "row-counts-once-in-sums": (CASE, HEADER, "weight * factor * x[i]", "factor * x[i]"),
    "merged-totals-not-shrunk": (CASE, ROWS, "fast::exp(one_largest - most)", "1.0f"),
    "merged-sums-not-shrunk": (CASE, ROWS, SHRUNK, "1.0f"),
    "not-divided": (CASE, ROWS, SHRUNK + " / sum", SHRUNK),
    "last-simdgroup-missing": (CASE, ROWS, "i < SIMDGROUPS; i++", "i < SIMDGROUPS - 1; i++"),
    "simdgroups-that-are-not": (WIDE, ROWS, "lane < SIMDGROUPS", "lane < 32"),
    "half-the-simdgroups-merged": (CASE, ROWS, "lane < SIMDGROUPS", "lane < 16"),
    "totals-without-largest": (CASE, ROWS, "most + log(sum)", "log(sum)"),
    "totals-without-sum": (CASE, ROWS, "most + log(sum)", "most"),
    "totals-unwritten": (CASE, ROWS, "thread_index == 0)", "thread_index + query == 0)"),
    "last-feature-unwritten": (CASE, ROWS, "thread_index < N)", "thread_index < N - 1)"),
    "features-past-the-last": (CASE, ROWS, "thread_index < N)", "thread_index < N + 1)"),
    "outputs-of-all-queries-in-one": (CASE, ROWS, "n_queries + query;", "n_queries;"),
    "outputs-of-another-head": (CASE, ROWS, "n_heads + head)", "n_heads + (head ^ 1))"),
    "sink-not-in-the-sum": (CASE, SINKS, "mine.total = 1.0f", "mine.total = 0.0f"),
    "sink-of-the-first-head": (CASE, SINKS, "head * sinks", "0 * sinks"),
    "sink-of-each-simdgroup": (CASE, SINKS, "sg == 0", "sg >= 0"),
    "last-slot-not-seen": (CASE, SLOTS, "row < numbers_shape[2]", "row < numbers_shape[2] - 1"),
    "slot-past-the-last": (CASE, SLOTS, "row < numbers_shape[2]", "row <= numbers_shape[2]"),
    "first-slot-not-seen": (CASE, SLOTS, "row = sg;", "row = max(sg, 1);"),
    "slots-of-another-head": (CASE, SLOTS, "kv_head * numbers", "(1 - kv_head) * numbers"),
    "slots-of-another-batch": (CASE, SLOTS, "numbers + batch", "numbers + 0"),
    "factors-of-another-head": (CASE, SLOTS, "kv_head * scales", "(1 - kv_head) * scales"),
    "factors-of-another-batch": (CASE, SLOTS, "scales + batch", "scales + 0"),
    "slots-as-if-copied": (CASE, SLOTS, "* numbers_strides[1]", "* numbers_shape[2] * 2 * N"),
    "factors-of-the-next-slot": (CASE, SLOTS, "factors + row", "factors + (row ^ 1)"),
    "factor-of-the-value": (CASE, SLOTS, "* factor[0]", "* factor[1]"),
    "factor-of-the-key": (CASE, SLOTS, "factor[scales_strides[3]]", "factor[0]"),
    "keys-as-values": (CASE, SLOTS, "+ N * numbers_strides[3]", "+ 0"),
    "slots-count-once": (CASE, HEADER, "weight * factor * x[i]", "weight * x[i]"),
    "neighbours-where-there-are-none": (CASE, HEADER, "i * stride", "i"),
}


def kernel_error(metal: MLXBackend, reference: Backend, case: DecodeCase) -> float:
    """Of keys in columns, so that both ways of reading are tried."""
    queries, dense, sinks = make_arguments(metal, case, "float32", has_sinks=True)
    keys = mx.repeat(dense.keys, 2, axis=3)
    keys[..., 1::2] = mx.nan
    return error_of(metal, reference, (queries, dense._replace(keys=keys[..., ::2]), sinks))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, plant, name):
    case, *fault = FAULTS[name]
    plant(*fault)
    metal.kernels.check = lambda *args: None
    try:
        error = kernel_error(metal, reference, case)
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert error > 10 * TOLERANCE["float32"], f"an error of {error:.1e} only"


def test_no_score_that_is_not_the_lowest_is_caught(metal, reference, plant):
    plant(HEADER, "-1e38f", "0.0f")
    metal.kernels.check = lambda *args: None
    with pytest.raises(ValueError, match="not finite"):
        test_scores_may_be_of_any_size(metal, reference, -128.0)


@pytest.mark.parametrize("occurrence", [0, 1])
def test_missing_barrier_is_caught(emulated, plant, occurrence):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    assert attend_dense.ROWS.count(barrier) == 2
    plant(ROWS, barrier, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        attend_dense.KERNEL(*make_arguments(emulated, CASE, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize(
    "fault",
    [
        *("keys-of-another-batch", "values-as-if-copied", "queries-see-all-rows"),
        *("sums-not-shrunk", "factors-of-another-head"),
    ],
)
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    case, *place = FAULTS[fault]
    plant(*place)
    # one of each, and a row a simdgroup
    one = {"n_heads": 1, "n_kv_heads": 1, "n_queries": 1, "batch": 1}
    case = replace(case, n_dense=20, n_kept=20, **one)
    with pytest.raises(xkv.InputError, match="attend_dense disagrees with its plain twin"):
        emulated.attend_dense(*make_arguments(emulated, case, "float16"))
