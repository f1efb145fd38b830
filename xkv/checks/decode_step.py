"""A synthetic decode step of one attention layer in three forms, checked and timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.config import BAND, MAX_WINDOW, XKVConfig
from xkv.ops.attention import reconstruct
from xkv.ops.backend import Backend
from xkv.ops.selection import make_landmarks
from xkv.ops.types import Array, Factor, Landmarks, RopeRun, RopeSpec, Segment
from xkv.store.codec import basis_row_bytes, pack_basis, pack_latent, row_bytes
from xkv.store.shapes import CacheShape, GroupShape

PARITY_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative L2 error between two forms of the same attention, on plain operations too."""


@dataclass(frozen=True)
class StepShape:
    """One layer of a model and how its cache is compressed."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int
    budget: int
    dtype: str
    batch: int = 1
    chunk_size: int = XKVConfig.chunk_size
    landmark_bits: int = XKVConfig.landmark_bits
    n_dense: int = XKVConfig.sinks + MAX_WINDOW
    latent_bits: tuple[int, ...] = ()
    """Bits of the parts of packed factors, about equally wide; none for factors in the KV dtype."""

    def parts(self, rank: int) -> list[tuple[int, int]]:
        """Columns and bits of each part of a factor; packed ones have whole bands."""
        if not self.latent_bits:
            return [(rank, 16)]
        bands = np.array_split(np.arange(-(-rank // BAND)), len(self.latent_bits))
        sizes = zip(map(len, bands), self.latent_bits, strict=True)
        return [(BAND * n_bands, bits) for n_bands, bits in sizes if n_bands]

    @property
    def item_bytes(self) -> int:
        """Of a number in the KV dtype."""
        return 4 if self.dtype == "float32" else 2

    def latent_row_bytes(self) -> int:
        """Bytes of a token in both latents."""
        return sum(
            row_bytes(width, bits, self.item_bytes)
            for rank in (self.rank_k, self.rank_v)
            for width, bits in self.parts(rank)
        )

    def basis_bytes(self) -> int:
        """Bytes of both bases."""
        return self.n_kv_heads * sum(
            width * basis_row_bytes(self.head_dim, bits, self.item_bytes)
            for rank in (self.rank_k, self.rank_v)
            for width, bits in self.parts(rank)
        )


LLAMA_8B = StepShape(32, 8, 128, 384, 576, 2048, "bfloat16")
"""Llama-3.1-8B in groups of 4 at the paper's ranks (8x at 64k tokens)."""
BUNDLED = StepShape(4, 2, 64, 102, 154, 512, "float32")
"""The bundled model in groups of 4 at about 4x."""


class DecodeStep:
    """The same random cache of ``n_tokens`` as dense rows, as factors, and with landmarks.

    Args:
        backend: Does the arithmetic.
        shape: The layer.
        n_tokens: Tokens in the cache, dense rows included.
        seed: Of the random numbers.
    """

    def __init__(self, backend: Backend, shape: StepShape, n_tokens: int, seed: int = 0) -> None:
        self.backend = backend
        self.shape = shape
        n_rows = (n_tokens - shape.n_dense) // shape.chunk_size * shape.chunk_size
        self.n_rows, self.n_dense = n_rows, n_tokens - n_rows
        batch, n_kv_heads, head_dim = shape.batch, shape.n_kv_heads, shape.head_dim
        dense = (batch, n_kv_heads, self.n_dense, head_dim)
        self.queries = self._draw((batch, shape.n_heads, 1, head_dim), seed, 2.0)
        self.dense_keys, self.dense_values = (
            self._draw(dense, seed + 1),
            self._draw(dense, seed + 2),
        )
        latent_k, basis_k = self._factors(shape.rank_k, seed + 3)
        latent_v, basis_v = self._factors(shape.rank_v, seed + 4)
        self.segment = Segment(
            latent_k,
            latent_v,
            basis_k,
            basis_v,
            0,
            (RopeRun(n_rows, RopeSpec.standard(head_dim, 500_000.0)),),
        )
        self.scale = head_dim**-0.5
        xp = backend.xp
        segment_keys = backend.reconstruct_keys(self.segment)
        segment_values = reconstruct(backend, self.segment.latent_v, self.segment.basis_v)
        self.keys = backend.own(xp.concat([segment_keys, self.dense_keys], axis=-2))
        self.values = backend.own(xp.concat([segment_values, self.dense_values], axis=-2))
        self.landmarks: Landmarks = make_landmarks(
            backend, segment_keys, shape.chunk_size, 0, shape.landmark_bits
        )[0]
        backend.evaluate(self.keys, self.values, *self.landmarks.held)

    def _draw(self, size: tuple[int, ...], seed: int, scale: float = 1.0) -> Array:
        xp = self.backend.xp
        return xp.astype(self.backend.normal(size, seed) * scale, getattr(xp, self.shape.dtype))

    def _factors(self, rank: int, seed: int) -> tuple[Factor, Factor]:
        """A latent and a basis in the shape's parts."""
        shape, backend = self.shape, self.backend
        widths, bits = zip(*shape.parts(rank), strict=True)
        rank = sum(widths)
        latent = self._draw((shape.batch, self.n_rows, rank), seed)
        size = (shape.batch, rank, shape.n_kv_heads, shape.head_dim)
        basis = self._draw(size, seed + 2, rank**-0.5)
        if shape.latent_bits:
            packed = pack_latent(backend, latent, widths, bits)
            rows = pack_basis(backend, basis, widths, bits)
            backend.evaluate(*packed.arrays, *rows.arrays)
            return packed, rows
        backend.evaluate(latent, basis)
        return latent, basis

    def full(self) -> Array:
        """The framework's attention over the full cache."""
        return self.backend.attention(self.queries, self.keys, self.values, self.scale, None)

    def dense(self) -> Array:
        """Attention over every row of the factors."""
        return self.backend.lowrank_attention(
            self.queries, self.segment, self.dense_keys, self.dense_values, self.scale
        )

    def selective(self, budget: int | None = None) -> Array:
        """Selection and attention over the selected rows."""
        chunks = self.backend.select_chunks(
            self.queries, self.landmarks, budget or self.shape.budget, self.scale
        )
        return self.backend.selected_attention(
            self.queries,
            self.segment,
            chunks,
            self.shape.chunk_size,
            self.dense_keys,
            self.dense_values,
            self.scale,
        )

    def forms(self) -> dict[str, Callable[[], Array]]:
        """The steps to compare, by name."""
        return {"full": self.full, "dense low-rank": self.dense, "selective": self.selective}

    def moved_bytes(self) -> dict[str, int]:
        """Bytes that each form has to read at least, by name."""
        shape = self.shape
        item = shape.item_bytes
        group = GroupShape(1, shape.n_kv_heads, shape.head_dim, shape.head_dim)
        cache, dense_bytes = CacheShape((group,), item), group.row_elements * item
        latent_bytes = shape.latent_row_bytes()
        fixed = self.n_dense * dense_bytes + shape.basis_bytes()
        config = XKVConfig(landmark_bits=shape.landmark_bits, chunk_size=shape.chunk_size)  # type: ignore[arg-type]
        landmarks = cache.landmark_bytes(group, config, self.n_rows // shape.chunk_size)
        selected = min(shape.budget, self.n_rows) * shape.n_kv_heads * latent_bytes
        return {
            "full": shape.batch * (self.n_rows + self.n_dense) * dense_bytes,
            "dense low-rank": shape.batch * (self.n_rows * latent_bytes + fixed),
            "selective": shape.batch * (landmarks + selected + fixed),
        }

    def parity(self) -> str | None:
        """Whether the forms agree where they must; a sentence if they do not.

        Every row attended to, dense low-rank and selective attention are attention over the full
        cache. Meant for short caches: it selects every chunk.
        """

        def numbers(x: Any) -> np.ndarray:
            return self.backend.to_numpy(x).astype(np.float64)

        want = numbers(self.full())
        for name, got in (
            ("dense low-rank", self.dense()),
            ("selective", self.selective(self.n_rows)),
        ):
            error = np.linalg.norm(numbers(got) - want) / np.linalg.norm(want)
            if not error <= PARITY_TOLERANCE[self.shape.dtype]:
                return (
                    f"{name} attention differs from full attention by {error:.1e} "
                    f"({self.shape.dtype}, {self.n_rows + self.n_dense} tokens; "
                    f"allowed {PARITY_TOLERANCE[self.shape.dtype]:.0e})"
                )
        return None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: the median and the middle half's ends."""

    median_ms: float
    low_ms: float
    high_ms: float


def time_alternating(
    backend: Backend, forms: Mapping[str, Callable[[], Array]], n_runs: int
) -> dict[str, Timing]:
    """Time several functions in turn, after one warm-up of each; the device is synchronized."""
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for run in range(n_runs + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            backend.evaluate(form())
            if run:
                samples[name].append((time.perf_counter() - began) * 1e3)
    timings = {}
    for name, times in samples.items():
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        timings[name] = Timing(statistics.median(times), low, high)
    return timings
