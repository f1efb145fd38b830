"""A prefilled document: exact rows of every layer, and the layers that gather them.

The backends' cache classes take these layers in place of a
:class:`xkv.cache.lowrank_cache.LayerCache`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xkv.cache.lowrank_cache import LowRankCache
from xkv.errors import InputError
from xkv.ops.attention import rope_rows
from xkv.ops.backend import Backend
from xkv.ops.scores import is_past
from xkv.ops.types import Array, Rope, RopeRun, RopeSpec

N_WATCHED = 32
"""Last queries of the document that are kept, for methods that look at what they attend to."""


class PromptLayer(ABC):
    """What a backend's cache class needs of one layer."""

    is_compressed = True
    """Attention is always computed here."""

    def __init__(self, backend: Backend, offset: int) -> None:
        self.backend = backend
        self.keys: Any = None
        """Rows that came since, ``[B, n_kv_heads, T, head_dim]``, rotated."""
        self.values: Any = None
        self._n_before = offset

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self._n_before + (0 if self.keys is None else self.keys.shape[-2])

    def append(self, keys: Array, values: Array, rope: Any) -> None:
        """Take new tokens of every question."""
        if self.keys is None:
            self.keys, self.values = keys, values
            return
        concat = self.backend.xp.concat
        self.keys = concat([self.keys, keys], axis=-2)
        self.values = concat([self.values, values], axis=-2)

    def dense(self) -> tuple[Array, Array]:
        """What a model is handed; its attention is computed by :meth:`attend` instead."""
        return self.keys, self.values

    def arrays(self) -> list[Array]:
        """The rows that came since."""
        return [x for x in (self.keys, self.values) if x is not None]

    @abstractmethod
    def attend(
        self, queries: Array, scale: float, mask: Array | None, sinks: Array | None = None
    ) -> Array:
        """Attention of the newest tokens, ``[B, n_heads, Lq, head_dim]``.

        Args:
            mask: By position, None for causal attention.
            sinks: Of models that are not evaluated.
        """


class DocumentLayer(PromptLayer):
    """Exact rows while a document is prefilled."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, 0)
        self.queries: Array | None = None
        """The last N_WATCHED rotated queries, ``[1, n_heads, N, head_dim]``."""
        self.scale = 0.0

    def attend(
        self, queries: Array, scale: float, mask: Array | None, sinks: Array | None = None
    ) -> Array:
        before = [] if self.queries is None else [self.queries]
        watched = self.backend.xp.concat([*before, queries], axis=-2)[..., -N_WATCHED:, :]
        self.queries, self.scale = self.backend.own(watched), scale
        n_queries = queries.shape[-2]
        if mask is None and n_queries > 1:
            mask = is_past(self.backend, self.offset, n_queries)
        return self.backend.attention(queries, self.keys, self.values, scale, mask)


@dataclass(frozen=True)
class Document:
    """A prefilled document: exact rows of every layer, which all methods start from.

    Args:
        backend: Does the arithmetic.
        keys: One a layer, ``[1, n_kv_heads, L, head_dim]``, rotated, in the KV dtype.
        values: One a layer, ``[1, n_kv_heads, L, value_dim]``.
        queries: One a layer, the last queries ``[1, n_heads, N, head_dim]``, rotated.
        ropes: What rotated each layer's keys.
        call_ends: Where each call of the prefill ended; some ropes rotate each call differently.
        scale: Factor on the scores.
        dtype: In which attention is computed.
        seed: For methods that draw random numbers.
        make_cache: Makes an empty low-rank cache with a configuration's fields.
    """

    backend: Backend
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    queries: tuple[Array, ...]
    ropes: tuple[Rope | None, ...]
    call_ends: tuple[int, ...]
    scale: float
    dtype: object
    seed: int
    make_cache: Callable[..., LowRankCache]

    @property
    def n_tokens(self) -> int:
        return self.keys[0].shape[-2]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the exact rows."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's exact rows."""
        return self.dense_bytes // self.n_tokens

    def rope_runs(self, layer: int) -> list[tuple[int, RopeSpec | None]]:
        """Where each run of rows that one spec rotated ends, and the spec."""
        rope = self.ropes[layer]
        runs: list[tuple[int, RopeSpec | None]] = []
        for end in self.call_ends:
            spec = None if rope is None else rope.at(end)
            if runs and runs[-1][1] == spec:
                runs.pop()
            runs.append((end, spec))
        return runs

    def plain_rows(self, name: str, layer: int) -> Array:
        """One layer's "keys", un-rotated, or "values": ``[L, n_kv_heads * dim]`` in float32.

        Raises:
            InputError: If they hold NaN or infinity.
        """
        xp, rows = self.backend.xp, getattr(self, name)[layer]
        rows = xp.astype(rows, self.backend.accumulate_dtype(rows))
        if not bool(xp.all(xp.isfinite(rows))):
            raise InputError(f"the {name} of layer {layer} hold NaN or infinity for this prompt")
        if name == "keys":
            ends = self.rope_runs(layer)
            begins = (0, *(end for end, _ in ends))
            runs = [RopeRun(end - start, x) for start, (end, x) in zip(begins, ends, strict=False)]
            rows = rope_rows(self.backend, rows, 0, tuple(runs), inverse=True)
        return xp.reshape(xp.permute_dims(rows[0], (1, 0, 2)), (self.n_tokens, -1))

    def widen(self, rows: Array) -> Array:
        """Rows in the dtype of the arithmetic."""
        return self.backend.xp.astype(rows, self.dtype)
