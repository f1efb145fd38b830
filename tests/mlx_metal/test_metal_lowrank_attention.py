"""The Metal kernel of dense low-rank decode, against the reference and with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import lowrank_attention
from xkv.backends.mlx_metal.kernels.lowrank_attention import LowrankAttention
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, DecodeInputs, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops import attention
from xkv.ops.backend import Backend
from xkv.ops.kernels import CHECK_TOLERANCE
from xkv.ops.types import RopeRun, RopeSpec

pytest_plugins = ["tests.metal_device"]

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
CASE = DecodeCase(136, 8, 2, 64, 37, 21, batch=2, n_dense=70, rope_scale=1.2)
"""Three tiles and two dense ones, two steps of the product, and a rotation that scales."""

Change = Callable[[DecodeInputs], DecodeInputs]


def keep(inputs: DecodeInputs) -> DecodeInputs:
    return inputs


def with_rope(spec: RopeSpec | None) -> Change:
    def change(inputs: DecodeInputs) -> DecodeInputs:
        runs = (RopeRun(inputs.segment.rope_runs[0].n_rows, spec),)
        return replace(inputs, segment=inputs.segment._replace(rope_runs=runs))

    return change


def arguments(inputs: DecodeInputs) -> tuple[Any, ...]:
    return inputs.queries, inputs.segment, inputs.keys, inputs.values, inputs.scale


def run_kernel(metal: MLXBackend, *args: Any) -> mx.array:
    output = metal.lowrank_attention(*args)
    assert metal.kernels.last_path["lowrank_attention"] == "lowrank_attention"
    return output


def expected_output(
    reference: Backend, case: DecodeCase, dtype: str, change: Change = keep
) -> np.ndarray:
    inputs = change(make_inputs(reference, case, dtype, exact=True))
    return reference.to_numpy(attention.lowrank_attention(reference, *arguments(inputs)))


def hide_unused(inputs: DecodeInputs) -> DecodeInputs:
    """The same rows, each array the front part of a longer one that ends in NaN."""

    def longer(x: mx.array) -> mx.array:
        n_rows = x.shape[-2]
        full = mx.full((*x.shape[:-2], n_rows + 5, x.shape[-1]), mx.nan, dtype=x.dtype)
        full[..., :n_rows, :] = x
        return full[..., :n_rows, :]

    segment = inputs.segment._replace(
        latent_k=longer(inputs.segment.latent_k), latent_v=longer(inputs.segment.latent_v)
    )
    return replace(inputs, segment=segment, keys=longer(inputs.keys), values=longer(inputs.values))


def assert_right(
    metal: MLXBackend, reference: Backend, case: DecodeCase, dtype: str, change: Change = keep
) -> None:
    """Run the kernel on a case, and compare with the reference."""
    inputs = hide_unused(change(make_inputs(metal, case, dtype)))
    output = run_kernel(metal, *arguments(inputs))
    assert output.dtype == inputs.queries.dtype
    want = expected_output(reference, case, dtype, change)
    assert relative_error(metal.to_numpy(output), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowrank_attention_is_right(metal, reference, case, dtype):
    assert_right(metal, reference, case, dtype)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_lowrank_attention_does_not_depend_on_the_schedule(emulated, reference, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert_right(emulated, reference, CASE, "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_attention_agrees_with_its_plain_twin(metal, dtype):
    args = arguments(make_inputs(metal, CASE, dtype))
    want = metal.to_numpy(attention.lowrank_attention(metal, *args))
    # the twin rounds keys and scores to the dtype, the kernel does not
    assert relative_error(metal.to_numpy(run_kernel(metal, *args)), want) < (CHECK_TOLERANCE[dtype])


@pytest.mark.parametrize(("n_rows", "n_dense"), [(1, 1), (63, 64), (64, 65), (65, 63), (193, 129)])
def test_lowrank_attention_takes_any_number_of_rows(metal, reference, n_rows, n_dense):
    case = replace(CASE, n_rows=n_rows, n_dense=n_dense, n_selected_chunks=0)
    assert_right(metal, reference, case, "float16")


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads"), [(3, 3), (8, 2), (8, 1), (16, 1), (20, 1)], ids=str
)
def test_lowrank_attention_takes_any_gqa_ratio(metal, reference, n_heads, n_kv_heads):
    case = replace(CASE, n_heads=n_heads, n_kv_heads=n_kv_heads)
    assert_right(metal, reference, case, "float16")


@pytest.mark.parametrize(("rank_k", "rank_v"), [(1, 1), (8, 7), (32, 300), (100, 3)])
def test_lowrank_attention_takes_any_ranks(metal, reference, rank_k, rank_v):
    assert_right(metal, reference, replace(CASE, rank_k=rank_k, rank_v=rank_v), "float16")


def test_lowrank_attention_takes_values_of_another_width(metal, reference):
    def narrow(inputs: DecodeInputs) -> DecodeInputs:
        segment = inputs.segment._replace(basis_v=inputs.segment.basis_v[..., :40])
        return replace(inputs, segment=segment, values=inputs.values[..., :40])

    assert_right(metal, reference, CASE, "float16", narrow)


def test_lowrank_attention_takes_transposed_keys(metal, reference):
    inputs = make_inputs(metal, CASE, "float16")
    turned = mx.contiguous(inputs.keys.swapaxes(-1, -2)).swapaxes(-1, -2)
    output = run_kernel(metal, *arguments(replace(inputs, keys=turned)))
    want = expected_output(reference, CASE, "float16")
    assert relative_error(metal.to_numpy(output), want) < TOLERANCE["float16"]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        RopeSpec.standard(32, 10_000.0, traditional=True),
        RopeSpec((1.0, 30.0, 900.0)),
        RopeSpec(RopeSpec.standard(64, 500_000.0, position_scale=0.25).freqs, scale=0.7),
    ],
    ids=["no-rope", "partial-traditional", "six-features", "scaled"],
)
def test_lowrank_attention_rotates_like_the_reference(metal, reference, spec):
    assert_right(metal, reference, CASE, "float32", with_rope(spec))


def with_dense(inputs: DecodeInputs, n_dense: int) -> DecodeInputs:
    return replace(
        inputs, keys=inputs.keys[..., :n_dense, :], values=inputs.values[..., :n_dense, :]
    )


@pytest.mark.parametrize(
    ("change", "mask", "sentence"),
    [
        (keep, mx.ones((1, 206), mx.bool_), "no mask"),
        (lambda x: replace(x, queries=mx.zeros((2, 8, 3, 64))), None, "one query, not 3"),
        (lambda x: with_dense(x, 0), None, "no dense rows"),
        (lambda x: replace(x, keys=x.keys.astype(mx.float32)), None, "keys float32"),
        (
            lambda x: replace(x, segment=x.segment._replace(basis_k=mx.zeros((2, 37, 2, 80)))),
            None,
            "basis_k float32",
        ),
        (
            lambda x: replace(x, segment=x.segment._replace(basis_k=x.segment.basis_k[..., :48])),
            None,
            "head_dim 64, 128, 256, not 48",
        ),
        (
            lambda x: replace(x, segment=x.segment._replace(rope_runs=x.segment.rope_runs * 2)),
            None,
            "has 2 different rotations",
        ),
    ],
    ids=["mask", "queries", "no-dense", "dtypes", "basis-dtype", "head-dim", "runs"],
)
def test_why_not_says_what_the_kernel_does_not_take(metal, change, mask, sentence):
    inputs = change(make_inputs(metal, CASE, "float16"))
    assert sentence in LowrankAttention(metal).why_not(*arguments(inputs), mask)


# Name: part of the kernel, the text that is replaced, by what.
FAULTS = {
    "position-shifted": ("SOURCE", "float(start + first", "float(start + 1 + first"),
    "last-row-dropped": ("SOURCE", "row >= end", "row >= end - 1"),
    "last-row-not-loaded": ("SOURCE", "i < end ?", "i < end - 1 ?"),
    "last-rank-dropped": ("HEADER", "width - column)", "width - 1 - column)"),
    "rope-scale-dropped": ("SOURCE", "key[j] * rope[0]", "key[j]"),
    "score-scale-dropped": ("SOURCE", "score * scale", "score"),
    "wrong-kv-head": ("SOURCE", "n_kv_heads + head) * D, n", "n_kv_heads + 1 - head) * D, n"),
    "wrong-dense-kv-head": ("SOURCE", "head * keys_strides", "(1 - head) * keys_strides"),
    "wrong-query-head": ("SOURCE", "query[g * D", "query[(gqa - 1 - g) * D"),
    "wrong-batch": ("SOURCE", "int64_t(batch) * n_rows", "int64_t(0) * n_rows"),
}


def plant(monkeypatch, part: str, old: str, new: str, occurrence: int = 0) -> None:
    """Replace one occurrence of a text in the kernel's source."""
    pieces = getattr(lowrank_attention, part).split(old)
    assert occurrence + 1 < len(pieces), f"{old!r} is not in the source"
    before, after = pieces[: occurrence + 1], pieces[occurrence + 1 :]
    monkeypatch.setattr(lowrank_attention, part, old.join(before) + new + old.join(after))


def queries_for_last_row(reference: Backend) -> np.ndarray:
    """Half of the case's query heads seek the segment's last key, so that losing it shows."""
    inputs = make_inputs(reference, CASE, "float16", exact=True)
    keys = reference.to_numpy(attention.reconstruct_keys(reference, inputs.segment))[:, :, -1:]
    queries = reference.to_numpy(inputs.queries).copy()
    queries[:, ::2] = np.repeat(keys, CASE.n_heads // CASE.n_kv_heads, axis=1)[:, ::2]
    return queries.astype(np.float16)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, monkeypatch, name):
    plant(monkeypatch, *FAULTS[name])
    queries = queries_for_last_row(reference)
    inputs = replace(make_inputs(metal, CASE, "float16"), queries=metal.from_numpy(queries))
    try:
        output = metal.to_numpy(LowrankAttention(metal)(*arguments(inputs)))
    except emulator.MetalKernelError:
        return
    exact = reference.from_numpy(queries.astype(np.float64))
    want = expected_output(reference, CASE, "float16", lambda x: replace(x, queries=exact))
    error = np.linalg.norm(output.astype(np.float64) - want) / np.linalg.norm(want)
    assert not error <= 10 * TOLERANCE["float16"]


@pytest.mark.parametrize("occurrence", range(lowrank_attention.HEADER.count(BARRIER)))
def test_deleted_barrier_is_caught(emulated, monkeypatch, occurrence):
    assert BARRIER not in lowrank_attention.SOURCE
    plant(monkeypatch, "HEADER", BARRIER, "", occurrence)
    args = arguments(make_inputs(emulated, CASE, "float16"))
    with pytest.raises(emulator.MetalKernelError) as caught:
        mx.eval(LowrankAttention(emulated)(*args))
    assert caught.value.kind in ("data-race", "uninitialised")
