"""One table of decode-attention cases, and the arrays of each, the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xkv.ops.backend import Backend
from xkv.ops.packed import Packed, unpacked
from xkv.ops.types import RopeRun, RopeSpec, Segment
from xkv.store.codec import pack_basis, pack_latent

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

Layout = tuple[tuple[int, int], ...]
"""Columns and bits of each part of a packed latent."""
LAYOUTS: dict[str, Layout] = {
    "one-part": ((64, 4),),
    "groups-of-64": ((64, 16), (64, 8), (128, 6), (64, 5), (64, 4), (64, 3), (64, 2)),
    "groups-of-32": ((32, 8), (96, 6), (32, 5), (96, 4), (32, 3), (96, 2)),
}
PACKED_CASES = {
    "gqa1": DecodeCase(80, 2, 2, 64, 0, 0, n_selected_chunks=9),
    "gqa4-batch2": DecodeCase(136, 8, 2, 64, 0, 0, n_dense=9, batch=2, rope_scale=1.2),
}
"""Ranks are those of a layout."""


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


def make_packed_inputs(
    backend: Backend, case: DecodeCase, layout: Layout, dtype: str
) -> DecodeInputs:
    """:func:`make_inputs` with latents and bases packed in a layout."""
    widths, bits = zip(*layout, strict=True)
    inputs = make_inputs(backend, replace(case, rank_k=sum(widths), rank_v=sum(widths)), dtype)
    plain = inputs.segment
    segment = plain._replace(
        latent_k=pack_latent(backend, plain.latent_k, widths, bits),
        latent_v=pack_latent(backend, plain.latent_v, widths, bits),
        basis_k=pack_basis(backend, plain.basis_k, widths, bits),
        basis_v=pack_basis(backend, plain.basis_v, widths, bits),
    )
    return replace(inputs, segment=segment)


def exact_factor(backend: Backend, reference: Backend, factor: Any) -> Any:
    """What a packed latent stands for, or what a basis is widened to, in float64."""
    if len(factor.shape) == 4:
        # widened by ordinary operations, whose rounding is not the kernel's
        factor = Packed.plain(unpacked(backend, factor))

    def exact(x: Any) -> Any:
        if "int32" in str(x.dtype):
            return reference.from_numpy(backend.to_numpy(x).view(np.int32))
        return reference.from_numpy(backend.to_numpy(x).astype(np.float64))

    return factor.map(exact).unpack(reference)


def exact_packed_inputs(backend: Backend, reference: Backend, inputs: DecodeInputs) -> DecodeInputs:
    """Packed inputs as arrays in float64 on the reference."""

    def exact(x: Any) -> Any:
        return reference.from_numpy(backend.to_numpy(x).astype(np.float64))

    names = ("latent_k", "latent_v", "basis_k", "basis_v")
    factors = {
        name: exact_factor(backend, reference, getattr(inputs.segment, name)) for name in names
    }
    return replace(
        inputs,
        queries=exact(inputs.queries),
        segment=inputs.segment._replace(**factors),
        keys=exact(inputs.keys),
        values=exact(inputs.values),
        chunks=reference.from_numpy(backend.to_numpy(inputs.chunks)),
    )


def hide_rows(backend: Backend, latent: Packed, is_used: np.ndarray, n_spare: int = 3) -> Packed:
    """NaN for the scales (and 16-bit numbers) of unused rows, and of rows past the end."""
    xp = backend.xp
    n_rows = latent.shape[1]
    mask = backend.from_numpy(is_used[..., None])

    def hide(x: Any) -> Any:
        spare = x[:, :n_spare]
        if "int32" not in str(x.dtype):
            x, spare = xp.where(mask, x, xp.nan * x), xp.nan * spare
        return xp.concat([x, spare], axis=1)[:, :n_rows]

    return latent.map(hide)
