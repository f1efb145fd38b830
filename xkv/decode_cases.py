"""One table of decode-attention cases, and the arrays of each, the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.attention import RopeRun, Segment
from xkv.backend import Backend
from xkv.rope import RopeSpec

CHUNK_SIZE = 8


@dataclass(frozen=True)
class DecodeCase:
    """Shapes of one decode step."""

    n_rows: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int
    n_dense: int = 21
    n_selected_chunks: int = 5
    rope_dims: int | None = None
    traditional: bool = False
    batch: int = 1
    start: int = 4
    rope_scale: float = 1.0

    def __str__(self) -> str:
        rope = "traditional" if self.traditional else "halves"
        return (
            f"B{self.batch}-L{self.n_rows}-H{self.n_heads}-kv{self.n_kv_heads}-D{self.head_dim}"
            f"-r{self.rank_k}x{self.rank_v}-dense{self.n_dense}-{rope}{self.rope_dims or ''}"
        )


CASES = [
    DecodeCase(64, 2, 2, 64, 16, 24),
    DecodeCase(136, 8, 2, 64, 37, 50, traditional=True),
    DecodeCase(128, 4, 1, 128, 48, 33, n_dense=1, start=300),
    DecodeCase(72, 8, 1, 64, 8, 8, n_dense=64, rope_dims=32, n_selected_chunks=9),
    DecodeCase(264, 4, 2, 64, 65, 96, n_dense=130, batch=2, n_selected_chunks=17),
    DecodeCase(80, 2, 1, 256, 40, 40, n_selected_chunks=8, rope_scale=1.2),
]
DTYPES = ["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class DecodeInputs:
    """The arrays of a case on one backend; the names are those of the backend's methods."""

    queries: Any
    segment: Segment
    keys: Any
    values: Any
    chunks: Any
    scale: float


def make_inputs(
    backend: Backend, case: DecodeCase, dtype: str, seed: int = 0, *, exact: bool = False
) -> DecodeInputs:
    """Random arrays, rounded to ``dtype``, that make a peaked softmax (a flat one hides faults).

    Args:
        exact: Hold the rounded numbers in float64, for the reference.
    """
    random = np.random.default_rng(seed)
    xp = backend.xp

    def array(*shape: int, size: float = 1.0) -> Any:
        drawn = backend.from_numpy((random.standard_normal(shape) * size).astype(np.float32))
        rounded = xp.astype(drawn, getattr(xp, dtype))
        return xp.astype(rounded, xp.float64) if exact else rounded

    batch, n_kv_heads, head_dim = case.batch, case.n_kv_heads, case.head_dim
    spec = RopeSpec.standard(case.rope_dims or head_dim, 10_000.0, case.traditional)
    spec = RopeSpec(spec.freqs, spec.traditional, case.rope_scale)
    segment = Segment(
        array(batch, case.n_rows, case.rank_k),
        array(batch, case.n_rows, case.rank_v),
        array(batch, case.rank_k, n_kv_heads, head_dim, size=case.rank_k**-0.5),
        array(batch, case.rank_v, n_kv_heads, head_dim, size=case.rank_v**-0.5),
        case.start,
        (RopeRun(case.n_rows, spec),),
    )
    ids = [
        [random.permutation(case.n_rows // CHUNK_SIZE) for _ in range(n_kv_heads)]
        for _ in range(batch)
    ]
    chunks = np.array(ids, dtype=np.int32)[..., : case.n_selected_chunks]
    return DecodeInputs(
        queries=array(batch, case.n_heads, 1, head_dim, size=3.0),
        segment=segment,
        keys=array(batch, n_kv_heads, case.n_dense, head_dim),
        values=array(batch, n_kv_heads, case.n_dense, head_dim),
        chunks=backend.from_numpy(chunks),
        scale=head_dim**-0.5,
    )
