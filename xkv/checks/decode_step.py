"""A synthetic decode step of one attention layer in three forms, checked and timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xkv.config import BAND, USUAL_COMPRESSION, XKVConfig
from xkv.errors import InputError
from xkv.ops.attention import Dense, attend_all, rebuild_all, wide_basis
from xkv.ops.backend import Backend
from xkv.ops.index import rows_of_index
from xkv.ops.latent import WORD_BITS, Latent
from xkv.ops.recent import packed
from xkv.ops.types import Array, RopeRun, RopeSpec, Segment, Stored
from xkv.ops.working_set import attend_set
from xkv.planning.chips import MODELS, NamedModel
from xkv.planning.decode_cost import (
    Bits,
    LayerShape,
    Parts,
    every_row,
    full_cache,
    total,
    working_set,
)

PARITY_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative L2 error between two forms of the same attention, on plain operations too."""

RECENT_TOLERANCE = 5e-3
"""The same where some rows are in 8 bits."""

PERIOD = 4096
"""Random dense rows repeat after so many: drawing more would take longer than timing them."""

Form = Callable[[], Sequence[Array]]


@dataclass(frozen=True)
class StepShape:
    """One layer of a model, and the dtype of its cache.

    Args:
        model: Whose layer.
        dtype: Of the rows that are held.
        batch: Sequences.
        budget: As in :class:`xkv.config.XKVConfig`.
    """

    model: NamedModel
    dtype: str = "float16"
    batch: int = 1
    budget: int | None = None

    @property
    def config(self) -> XKVConfig:
        """What says how many rows are recent and rebuilt."""
        return XKVConfig(compression=USUAL_COMPRESSION, budget=self.budget)

    def layer(self, n_tokens: int) -> LayerShape:
        """With the latents of a cache of ``n_tokens``.

        Raises:
            InputError: If so few tokens are not compressed.
        """
        layer = self.model.layer(self.config, n_tokens, 4 if self.dtype == "float32" else 2)
        if not layer.key_bits:
            raise InputError(f"{n_tokens} tokens are too few to be compressed")
        return layer


LLAMA_8B = StepShape(MODELS["Llama-3.1-8B"], "bfloat16")
SMOLLM2 = StepShape(MODELS["SmolLM2-135M"])
BUNDLED = StepShape(MODELS["bundled"])


class DecodeStep:
    """The same random cache of ``n_tokens`` as dense rows and as a store with recent rows.

    Rows are held in the shape's dtype; where a backend computes in another, each step widens them.
    Dense rows and stored ones are the same in :meth:`parity` only.

    Args:
        backend: Does the arithmetic.
        shape: The layer.
        n_tokens: Tokens in the cache, dense rows included.
        seed: Of the random numbers.
    """

    def __init__(self, backend: Backend, shape: StepShape, n_tokens: int, seed: int = 0) -> None:
        self.backend, self.shape, self.n_tokens = backend, shape, n_tokens
        self.config, self.layer = shape.config, shape.layer(n_tokens)
        group, layout = self.layer.group, self.config.layout(n_tokens)
        self.n_rows, self.n_recent = layout.n_rows, layout.n_recent
        self.n_rebuilt = self.config.rebuilt_at(self.n_rows, self.n_recent) or self.n_rows
        self.scale = group.key_dim**-0.5
        self.dtype = getattr(backend.xp, shape.dtype)
        self._random = np.random.default_rng(seed)
        self.queries = self._draw(shape.batch, self.layer.n_heads, 1, group.key_dim, size=2.0)
        rope = RopeRun(self.n_rows, RopeSpec.standard(group.key_dim, 500_000.0))
        self.stored = Segment(
            self._store(self.layer.key_bits, group.key_dim, (rope,)),
            self._store(self.layer.value_bits, group.value_dim, ()),
        )
        self._fill()
        self.keys, self.values = (
            self._rows(n_tokens, dim) for dim in (group.key_dim, group.value_dim)
        )

    def _fill(self) -> None:
        """Dense rows, and recent ones, which are the last of the store."""
        n_dense, segment = self.n_tokens - self.n_rows, self.segment()
        keys, values = (self._rows(n_dense, stored.basis.shape[-1]) for stored in segment)
        recent = None
        if self.n_recent:
            last = (rebuild_all(self.backend, x)[..., -self.n_recent :, :] for x in segment)
            recent = packed(self.backend, *last)
        self.dense = Dense(keys, values, None, recent)
        self.backend.evaluate(self.queries, keys, values, *(recent or ()))

    def _draw(self, *shape: int, size: float = 1.0) -> Array:
        numbers = (self._random.standard_normal(shape) * size).astype(np.float32)
        return self.backend.xp.astype(self.backend.from_numpy(numbers), self.dtype)

    def _rows(self, n_rows: int, dim: int) -> Array:
        """Random dense rows, which repeat."""
        xp, n_heads = self.backend.xp, self.layer.group.n_kv_heads
        drawn = self._draw(self.shape.batch, n_heads, min(n_rows, PERIOD), dim)
        whole = xp.concat([drawn] * -(-n_rows // PERIOD), axis=-2)
        rows = self.backend.own(whole[..., :n_rows, :])
        self.backend.evaluate(rows)
        return rows

    def _store(self, bits: Bits, dim: int, runs: tuple[RopeRun, ...]) -> Stored:
        """Random codes, which stand for numbers with a variance of one."""
        backend, rank = self.backend, BAND * len(bits)
        size = (self.shape.batch, self.n_rows)
        words = self._random.integers(
            0, 1 << WORD_BITS, (*size, sum(bits) * BAND // WORD_BITS), np.uint32
        )
        # PyTorch holds the same bits as signed numbers
        arrays = [backend.from_numpy(words if backend.name == "mlx" else words.view(np.int32))]
        codes = 2.0 ** np.array(bits)
        steps = np.sqrt(12 / (codes**2 - 1))
        for each in (steps, -steps * (codes - 1) / 2):
            row = backend.from_numpy(np.tile(each.astype(np.float32), (*size, 1)))
            arrays.append(backend.xp.astype(row, self.dtype))
        basis = self._draw(1, rank, self.layer.group.n_kv_heads, dim, size=rank**-0.5)
        index_rows = backend.own(rows_of_index(backend, basis, True)) if runs else None
        backend.evaluate(*arrays, basis, *([] if index_rows is None else [index_rows]))
        latent = Latent(tuple(arrays), bits)
        return Stored(latent, basis, self.config.sinks, runs, index_rows)

    def wide_queries(self) -> Array:
        """Queries in the dtype of the arithmetic."""
        return self.backend.xp.astype(self.queries, self.backend.step_dtype(self.dtype))

    def segment(self, n_left_out: int = 0) -> Segment:
        """What is stored but for the last rows, with bases in the dtype of the arithmetic."""
        xp, wide, end = (
            self.backend.xp,
            self.backend.step_dtype(self.dtype),
            self.n_rows - n_left_out,
        )
        keys, values = (
            x._replace(basis=wide_basis(self.backend, x.basis, wide), latent=x.latent.rows(0, end))
            for x in self.stored
        )
        runs = tuple(RopeRun(end, run.spec) for run in keys.rope_runs)
        index_rows = xp.astype(keys.index_rows, wide)
        return Segment(keys._replace(index_rows=index_rows, rope_runs=runs), values)

    def full(self) -> list[Array]:
        """The framework's attention over the full cache."""
        queries = self.wide_queries()
        keys, values = (self.backend.xp.astype(x, queries.dtype) for x in (self.keys, self.values))
        return [self.backend.attention(queries, keys, values, self.scale, None)]

    def every_row(self) -> list[Array]:
        """Attention over every stored row and the dense ones."""
        dense, segment = self.dense._replace(recent=None), self.segment()
        return [attend_all(self.backend, self.wide_queries(), segment, dense, self.scale)]

    def working_set(self, n_rebuilt: int | None = None) -> list[Array]:
        """Attention over the rows that matter most.

        Args:
            n_rebuilt: Instead of as many as the shape's configuration says.
        """
        queries, segment = self.wide_queries(), self.segment(self.n_recent)
        n_rebuilt = n_rebuilt or self.n_rebuilt
        return [attend_set(self.backend, queries, segment, self.dense, self.scale, n_rebuilt)]

    def forms(self) -> dict[str, Form]:
        """The steps to compare, by name."""
        return {
            "full": self.full,
            "every row": self.every_row,
            "working set": lambda: self.working_set(),
        }

    def parts(self) -> dict[str, Parts]:
        """The work of each form, by name."""
        counted = self.layer, self.config, self.n_tokens
        return {
            "full": full_cache(self.layer, self.n_tokens),
            "every row": every_row(*counted),
            "working set": working_set(*counted, self.backend.name == "mlx"),
        }

    def moved_bytes(self) -> dict[str, int]:
        """Bytes that each form moves, by name."""
        return {name: self.shape.batch * total(x).n_bytes for name, x in self.parts().items()}

    def parity(self) -> str | None:
        """Whether the forms agree where they must; a sentence if they do not.

        Every row attended to, all three are attention over the full cache. Meant for short caches:
        it rebuilds every row.
        """
        backend, first = self.backend, self.config.sinks
        for name, stored, held in zip(("keys", "values"), self.segment(), self.dense, strict=False):
            rows = backend.xp.astype(rebuild_all(backend, stored), self.dtype)
            parts = [held[..., :first, :], rows, held[..., first:, :]]
            setattr(self, name, backend.xp.concat(parts, axis=-2))

        def numbers(found: list[Array]) -> np.ndarray:
            backend.evaluate(*found)
            return backend.to_numpy(found[0]).astype(np.float64)

        want, n_missing = numbers(self.full()), self.n_rows - self.n_recent
        tolerance = PARITY_TOLERANCE[self.shape.dtype]
        for name, form, allowed in (
            ("every row", self.every_row, tolerance),
            (
                "working set",
                lambda: self.working_set(n_missing),
                max(tolerance, RECENT_TOLERANCE),
            ),
        ):
            error = np.linalg.norm(numbers(form()) - want) / np.linalg.norm(want)
            if not error <= allowed:
                return (
                    f"{name} differs from full attention by {error:.1e} "
                    f"({self.shape.dtype}, {self.n_tokens} tokens; allowed {allowed:.0e})"
                )
        return None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: the median and the middle half's ends."""

    median_ms: float
    low_ms: float
    high_ms: float


def time_alternating(backend: Backend, forms: Mapping[str, Form], n_runs: int) -> dict[str, Timing]:
    """Time several functions in turn, after one warm-up of each; the device is synchronized."""
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for run in range(n_runs + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            backend.evaluate(*form())
            if run:
                samples[name].append((time.perf_counter() - began) * 1e3)
    timings = {}
    for name, times in samples.items():
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        timings[name] = Timing(statistics.median(times), low, high)
    return timings
