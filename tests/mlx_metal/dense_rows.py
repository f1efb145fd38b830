"""Dense and recent rows for tests of the Metal kernel, and the reference's attention over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.checks.decode_cases import DecodeCase, make_inputs
from xkv.checks.tolerances import relative_error
from xkv.ops.backend import Backend
from xkv.ops.scores import Dense

CASE = DecodeCase(90, 8, 2, 64, 8, 8, n_dense=70, n_recent=45, n_queries=3, batch=2)
"""Three dense rows for some simdgroups, two for the others; and two recent ones, or one."""
WIDE = replace(CASE, head_dim=256)
"""Half the simdgroups."""

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
    recent = x.dense.recent and x.dense.recent.map(view)
    dense = Dense(view(x.dense.keys), view(x.dense.values), None, recent)
    return x.queries * x.scale, dense, sinks.astype(x.queries.dtype) if has_sinks else None


def far_arguments(metal: MLXBackend, size: float) -> Arguments:
    """All scores moved alike, by a feature of its own."""
    queries, dense, _ = make_arguments(metal, replace(CASE, n_recent=0), "float32")
    queries[..., 0], dense.keys[..., 0] = size, 1
    return queries, dense, mx.full((CASE.n_heads,), size + 2)


def expected(metal: MLXBackend, reference: Backend, arguments: Arguments) -> list[np.ndarray]:
    """In float64, of the same rounded inputs."""

    def exact(x: Any) -> Any:
        return reference.from_numpy(metal.to_numpy(x).astype(np.float64))

    queries, dense, sinks = arguments
    recent = dense.recent and dense.recent.map(exact)
    rows = Dense(exact(dense.keys), exact(dense.values), None, recent)
    want = reference.attend_dense(exact(queries), rows, None if sinks is None else exact(sinks))
    return [reference.to_numpy(x) for x in want]


def error_of(metal: MLXBackend, reference: Backend, arguments: Arguments) -> float:
    """Relative error of the kernel, the larger of both outputs', the path asserted."""
    got = metal.attend_dense(*arguments)
    assert metal.kernels.last_path["attend_dense"] == "attend_dense"
    assert [x.dtype for x in got] == [arguments[0].dtype, mx.float32]
    want = expected(metal, reference, arguments)
    return max(relative_error(metal.to_numpy(x), y) for x, y in zip(got, want, strict=True))
