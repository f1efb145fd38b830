"""The plain decode operations of MLX against the float64 reference, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from xkv import load_backend
from xkv.checks.decode_cases import CASES, DTYPES, DecodeInputs, make_inputs
from xkv.checks.operations import OPERATIONS
from xkv.checks.tolerances import PLAIN_TOLERANCE, relative_error
from xkv.ops.attention import attend_all, rebuild_all, rebuild_rows
from xkv.ops.backend import Backend
from xkv.ops.recent import packed
from xkv.ops.scores import Dense
from xkv.ops.types import RopeRun, RopeSpec, Segment
from xkv.ops.working_set import attend_set

DECODING = (
    *("attend_dense", "query_terms", "absorbed_queries", "index_scores", "choose_rows"),
    *("key_scores", "weigh_rows", "attend_all", "attend_set"),
)


@pytest.fixture(scope="module")
def plain_mlx() -> Backend:
    return load_backend("mlx", kernels="off")


@pytest.mark.parametrize("operation", DECODING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_parity(plain_mlx, reference, case, dtype, operation):
    run = OPERATIONS[operation]
    got = run(plain_mlx, make_inputs(plain_mlx, case, dtype), dtype)
    want = run(reference, make_inputs(reference, case, dtype, exact=True), dtype)
    error = relative_error(plain_mlx.to_numpy(got), reference.to_numpy(want))
    assert error < PLAIN_TOLERANCE[dtype]


def of_keys(x: DecodeInputs, **changes: Any) -> DecodeInputs:
    return replace(x, segment=x.segment._replace(keys=x.segment.keys._replace(**changes)))


def shift_position(x: DecodeInputs) -> DecodeInputs:
    return of_keys(x, start=x.segment.keys.start + 1)


def drop_last_dense_row(x: DecodeInputs) -> DecodeInputs:
    keys, values = (rows[..., :-1, :] for rows in x.dense[:2])
    return replace(x, dense=x.dense._replace(keys=keys, values=values))


def use_wrong_kv_head(x: DecodeInputs) -> DecodeInputs:
    return of_keys(x, basis=x.segment.keys.basis[:, :, [1, 0]])


def forget_scale(x: DecodeInputs) -> DecodeInputs:
    return replace(x, scale=1.0)


def forget_rotation(x: DecodeInputs) -> DecodeInputs:
    return of_keys(x, rope_runs=())


@pytest.mark.parametrize("operation", ["attend_all", "attend_set"])
@pytest.mark.parametrize(
    "fault",
    [shift_position, drop_last_dense_row, use_wrong_kv_head, forget_scale, forget_rotation],
)
def test_planted_fault_exceeds_the_bound_tenfold(
    plain_mlx, reference, operation: str, fault: Callable[..., DecodeInputs]
):
    run = OPERATIONS[operation]
    x = fault(make_inputs(plain_mlx, CASES[1], "float32"))
    got = run(plain_mlx, x, "float32")
    want = run(reference, make_inputs(reference, CASES[1], "float32", exact=True), "float32")
    error = relative_error(plain_mlx.to_numpy(got), reference.to_numpy(want))
    assert error > 10 * PLAIN_TOLERANCE["float32"]


def whole(backend: Backend, x: DecodeInputs, with_recent: bool) -> tuple[Any, Any]:
    """Keys and values of every row: those of the segment, recent ones, then dense ones."""
    found, recent = [], x.dense.recent
    for name, stored in zip(("keys", "values"), x.segment, strict=True):
        rows = [rebuild_all(backend, stored), getattr(x.dense, name)]
        if with_recent and recent is not None:
            rows.insert(1, getattr(recent, name)(backend, x.case.head_dim, rows[0].dtype))
        found.append(backend.xp.concat(rows, axis=-2))
    return tuple(found)


@pytest.mark.parametrize("case", [x for x in CASES if x.n_queries == 1], ids=str)
def test_attention_is_attention_over_the_rebuilt_rows(reference, case):
    x = make_inputs(reference, case, "float32", exact=True)
    for name in ("attend_all", "attend_set"):
        rows = whole(reference, x, with_recent=name == "attend_set")
        want = reference.attention(x.queries, *rows, x.scale, None)
        got = OPERATIONS[name](reference, x, "float32")
        assert relative_error(*map(reference.to_numpy, (got, want))) < 1e-12


@pytest.mark.parametrize("name", ["mlx", "torch"])
@pytest.mark.parametrize(("n_queries", "have_own"), [(5, True), (8, True), (9, False)])
def test_a_few_tokens_attend_to_what_each_would_alone(name, n_queries, have_own):
    backend = load_backend(name, kernels="off")
    x = make_inputs(backend, replace(CASES[6], n_queries=n_queries), "float32")
    together = backend.to_numpy(attend_set(backend, *given(x, n_queries, n_queries), 60))
    alone = [
        backend.to_numpy(attend_set(backend, *given(x, number + 1, 1), 60))
        for number in range(n_queries)
    ]
    error = relative_error(together, np.concatenate(alone, axis=2))
    # more of them share their rows
    assert error < 1e-6 if have_own else error > 0.1


def given(x: DecodeInputs, end: int, n_queries: int) -> tuple[Any, ...]:
    """The last queries up to one, with the dense rows that they see."""
    n_later = x.queries.shape[2] - end
    keys, values = (rows[..., : rows.shape[-2] - n_later, :] for rows in x.dense[:2])
    queries = x.queries[:, :, end - n_queries : end]
    return queries, x.segment, x.dense._replace(keys=keys, values=values), x.scale


def test_masked_rows_are_ignored(plain_mlx):
    x = make_inputs(plain_mlx, CASES[0], "float32")
    n_rows, n_dense = x.case.n_rows, x.dense.keys.shape[-2]
    is_seen = plain_mlx.xp.arange(n_rows + n_dense) < n_rows - 3
    short = Segment(
        *(
            stored._replace(
                latent=stored.latent.rows(0, n_rows - 3),
                rope_runs=tuple(RopeRun(n_rows - 3, run.spec) for run in stored.rope_runs),
            )
            for stored in x.segment
        )
    )
    got = attend_all(plain_mlx, x.queries, x.segment, x.dense, x.scale, is_seen[None])
    nothing = Dense(*(rows[..., :0, :] for rows in x.dense[:2]))
    want = attend_all(plain_mlx, x.queries, short, nothing, x.scale)
    assert relative_error(np.array(got), np.array(want)) < 1e-5


@pytest.mark.parametrize("name", ["mlx", "torch"])
@pytest.mark.parametrize("run", ["all", "set"])
def test_sinks_take_their_part_of_each_heads_weights(name, run):
    backend = load_backend(name, kernels="off")
    x = make_inputs(backend, CASES[6], "float32")
    sinks = backend.from_numpy(np.linspace(-2, 5, 8).astype(np.float32))
    given = backend, x.queries, x.segment, x.dense, x.scale
    rows = whole(backend, x, with_recent=run == "set")
    if run == "all":
        got = attend_all(*given, sinks=sinks)
    else:
        got = attend_set(*given, x.case.n_rows, sinks)
    keys, values = (np.repeat(backend.to_numpy(each), 4, axis=1) for each in rows)
    scores = backend.to_numpy(x.queries) @ keys.swapaxes(-1, -2) * x.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    nothing = np.exp(np.linspace(-2, 5, 8)[None, :, None, None] - scores.max(-1, keepdims=True))
    want = weights @ values / (weights.sum(-1, keepdims=True) + nothing)
    assert relative_error(backend.to_numpy(got), want) < 1e-5


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_rows_of_several_rope_runs_are_each_rotated_by_their_own(name):
    backend = load_backend(name, kernels="off")
    x = make_inputs(backend, CASES[0], "float32")
    n_rows = CASES[0].n_rows
    runs = (RopeRun(20, None), RopeRun(n_rows - 20, RopeSpec.standard(32, 99.0, True)))
    stored = x.segment.keys._replace(rope_runs=runs)
    every_row = backend.xp.broadcast_to(backend.positions(0, n_rows), (1, 2, n_rows))
    got = backend.to_numpy(rebuild_rows(backend, stored, every_row))
    want = backend.to_numpy(rebuild_all(backend, stored))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("name", ["mlx", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recent_rows_are_off_by_half_a_step_of_127(name, dtype):
    backend = load_backend(name, kernels="off")
    random = np.random.default_rng(0).standard_normal((2, 3, 9, 80)).astype(np.float32)
    random[0, 1, 2] = 0
    random[1, 2] *= 1e3
    keys, values = (
        backend.xp.astype(backend.from_numpy(x), getattr(backend.xp, dtype))
        for x in (random[..., :48], random[..., 48:])
    )
    recent = packed(backend, keys, values)
    assert (recent.n_rows, recent.numbers.shape, recent.scales.shape) == (
        *(9, (2, 3, 9, 80), (2, 3, 9, 2)),
    )
    for rows, want in ((recent.keys, keys), (recent.values, values)):
        held = backend.to_numpy(rows(backend, 48, backend.xp.float32))
        want = backend.to_numpy(want).astype(np.float32)
        largest = np.abs(want).max(-1, keepdims=True)
        assert (np.abs(held - want) <= largest / 127 * 0.5001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_words_are_the_same_bits_on_both_backends(plain_mlx, reference, bits, dtype):
    random = np.random.default_rng(0).standard_normal((3, 5, 128)).astype(np.float32)
    random[0, 0] = 0
    random[0, 1] = 7
    packed = []
    for backend in (plain_mlx, reference):
        x = backend.xp.astype(backend.from_numpy(random), getattr(backend.xp, dtype))
        parts = backend.quantize(x, 64, bits)
        packed.append([backend.to_numpy(part) for part in parts])
        error = backend.to_numpy(backend.dequantize(parts, 64, bits)) - backend.to_numpy(x)
        # half a step of the widest group, and the rounding of its scale
        assert np.abs(error).max() < 8 / (2**bits - 1) / 2 + 0.05
    for ours, reference_part in zip(*packed, strict=True):
        assert ours.tobytes() == reference_part.tobytes()
