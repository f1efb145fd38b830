"""Steps of several sequences, each with rows of its own, for tests of what attends to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xkv.checks.decode_cases import DecodeCase, DecodeInputs, make_inputs
from xkv.checks.tolerances import relative_error
from xkv.ops.backend import Backend
from xkv.ops.sequences import Latents
from xkv.ops.types import Segment
from xkv.ops.working_set import attend_set

PLAIN = DecodeCase(600, 8, 2, 64, 37, 50, n_dense=9, start=300)
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
TRADITIONAL = replace(PLAIN, traditional=True, rope_dims=32, n_recent=0)
SIZES = ((600, 9, 7), (70, 64, 45), (333, 21, 20), (257, 10, 300))
"""Rows of each sequence that are stored, dense and recent: the longest of each is another's."""


def make_sequences(
    backend: Backend, case: DecodeCase, dtype: str, n: int, *, exact: bool = False
) -> list[DecodeInputs]:
    """As many sequences with the first one's bases; arguments as :func:`make_inputs`'."""
    made: list[DecodeInputs] = []
    for seed, (n_rows, n_dense, n_recent) in enumerate(SIZES[:n]):
        n_recent = n_recent if case.n_recent else 0
        sizes = replace(case, n_rows=n_rows, n_dense=n_dense, n_recent=n_recent)
        x = make_inputs(backend, sizes, dtype, seed, exact=exact)
        basis = (made or [x])[0].segment
        segment = Segment(
            x.segment.keys._replace(basis=basis.keys.basis),
            x.segment.values._replace(basis=basis.values.basis),
        )
        made.append(replace(x, segment=segment))
    return made


def attend_each(backend: Backend, each: Sequence[DecodeInputs], sinks: Any = None) -> np.ndarray:
    """Every sequence alone, ``[B, n_heads, 1, dim]``."""
    outputs = [
        attend_set(backend, x.queries, x.segment, x.dense, x.scale, x.case.n_rebuilt, sinks)
        for x in each
    ]
    return np.concatenate([backend.to_numpy(x) for x in outputs])


def attend_at_once(backend: Backend, each: Sequence[DecodeInputs], sinks: Any = None) -> np.ndarray:
    """All in one step; dense rows are the first ones of buffers that go on with NaN."""
    xp, first = backend.xp, each[0]
    longest = max(each, key=lambda x: x.case.n_rows).segment
    segment = Segment(
        *(
            stored._replace(latent=Latents(tuple(x.segment[part].latent for x in each)))
            for part, stored in enumerate(longest)
        )
    )

    def buffer(x: Any) -> Any:
        return xp.concat([x, xp.nan * x[..., :3, :]], axis=-2)

    dense = [
        x.dense._replace(
            keys=buffer(x.dense.keys), values=buffer(x.dense.values), n_used=x.case.n_dense
        )
        for x in each
    ]
    queries = xp.concat([x.queries for x in each])
    output = attend_set(backend, queries, segment, dense, first.scale, first.case.n_rebuilt, sinks)
    return backend.to_numpy(output)


def error_at_once(
    backend: Backend,
    reference: Backend,
    case: DecodeCase,
    dtype: str,
    n: int,
    has_sinks: bool = False,
) -> float:
    """Relative error of a step of n sequences against each alone in float64."""
    xp = backend.xp
    sinks = exact_sinks = None
    if has_sinks:
        drawn = backend.normal((case.n_heads,), 5) * 2 + 3
        sinks = xp.astype(drawn, getattr(xp, dtype))
        exact_sinks = reference.from_numpy(backend.to_numpy(sinks).astype(np.float64))
    got = attend_at_once(backend, make_sequences(backend, case, dtype, n), sinks)
    exact = make_sequences(reference, case, dtype, n, exact=True)
    return relative_error(got, attend_each(reference, exact, exact_sinks))
