"""One table of decode-attention cases, and the arrays of each, the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.recent import packed
from xkv.ops.scores import Dense
from xkv.ops.types import RopeRun, RopeSpec, Segment, Stored
from xkv.store.codec import pack_latent


@dataclass(frozen=True)
class DecodeCase:
    """Shapes of one decode step.

    Args:
        bits: Of the bands of both latents, whose ranks then follow from them.
        n_recent: Rows in 8 bits.
        spec: None for a layer without rotary embedding.
    """

    n_rows: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rank_k: int = 0
    rank_v: int = 0
    bits: tuple[int, ...] = ()
    n_dense: int = 21
    n_recent: int = 7
    n_rebuilt: int = 40
    n_queries: int = 1
    rope_dims: int | None = None
    traditional: bool = False
    batch: int = 1
    start: int = 4
    rope_scale: float = 1.0

    def __str__(self) -> str:
        rope = "traditional" if self.traditional else "halves"
        ranks = "-".join(map(str, self.bits)) or f"{self.rank_k}x{self.rank_v}"
        return (
            f"B{self.batch}-L{self.n_rows}-H{self.n_heads}-kv{self.n_kv_heads}-D{self.head_dim}"
            f"-r{ranks}-dense{self.n_dense}-q{self.n_queries}-{rope}{self.rope_dims or ''}"
        )

    @property
    def spec(self) -> RopeSpec:
        """What rotates the keys."""
        spec = RopeSpec.standard(self.rope_dims or self.head_dim, 10_000.0, self.traditional)
        return RopeSpec(spec.freqs, spec.traditional, self.rope_scale)


CASES = [
    DecodeCase(64, 2, 2, 64, 16, 24),
    DecodeCase(136, 8, 2, 64, 37, 50, traditional=True, n_recent=0),
    DecodeCase(600, 4, 1, 128, 70, 33, n_dense=9, start=300, n_queries=5),
    DecodeCase(72, 8, 1, 64, 8, 8, n_dense=64, rope_dims=32),
    DecodeCase(264, 4, 2, 64, bits=(4,), n_dense=130, batch=2),
    DecodeCase(80, 2, 1, 256, 40, 40, rope_scale=1.2),
    DecodeCase(700, 8, 2, 64, bits=(8, 6, 5, 4, 3, 2), batch=2, rope_scale=1.2),
    DecodeCase(333, 8, 2, 128, bits=(6, 2, 2, 2), n_queries=3),
]
DTYPES = ["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class DecodeInputs:
    """The arrays of a case on one backend."""

    case: DecodeCase
    queries: Any
    segment: Segment
    dense: Dense
    rows: Any
    """Some rows of the segment in no order, ``[B, n_kv_heads, n_rebuilt]``."""
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
    packs = [case.rank_k, case.rank_v]
    if case.bits:
        packs = [BAND * len(case.bits)] * 2
    stored = []
    for rank, runs in zip(packs, ((RopeRun(case.n_rows, case.spec),), ()), strict=True):
        numbers = array(batch, case.n_rows, rank)
        if case.bits:
            # fading columns: a band's mean is what the index reads of it
            numbers = pack_latent(backend, xp.astype(numbers, getattr(xp, dtype)), case.bits)
            latent = numbers.astype(backend, xp.float64) if exact else numbers
        else:
            latent = Latent((numbers,))
        basis = array(batch, rank, n_kv_heads, head_dim, size=rank**-0.5)
        stored.append(Stored(latent, basis, case.start, runs))
    ids = [[random.permutation(case.n_rows) for _ in range(n_kv_heads)] for _ in range(batch)]
    numbers = np.array(ids, dtype=np.int32)
    rows = backend.from_numpy(numbers[..., : case.n_rebuilt])
    keys, values = (array(batch, n_kv_heads, case.n_dense, head_dim) for _ in range(2))
    recent = None
    if case.n_recent:
        size = batch, n_kv_heads, case.n_recent, head_dim
        recent = packed(backend, array(*size), array(*size))
    return DecodeInputs(
        case=case,
        queries=array(batch, case.n_heads, case.n_queries, head_dim, size=3.0),
        segment=Segment(*stored),
        dense=Dense(keys, values, None, recent),
        rows=rows,
        scale=head_dim**-0.5,
    )


def hide_rows(backend: Backend, latent: Latent, is_used: np.ndarray, n_spare: int = 3) -> Latent:
    """NaN for the numbers (of packed rows the scales) of unused rows, and of rows past the end."""
    xp = backend.xp
    n_rows = latent.shape[1]
    mask = backend.from_numpy(is_used[..., None])

    def hide(x: Any) -> Any:
        spare = x[:, :n_spare]
        if "int32" not in str(x.dtype):
            x, spare = xp.where(mask, x, xp.nan * x), xp.nan * spare
        return xp.concat([x, spare], axis=1)[:, :n_rows]

    return latent.map(hide)
