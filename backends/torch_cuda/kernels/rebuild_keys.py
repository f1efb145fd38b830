"""Some rows of keys, rotated, and their scores: the kernel that rebuilds them, with queries."""

from __future__ import annotations

from typing import Any

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
from xkv.backends.torch_cuda.kernels.rebuild_rows import KERNEL as REBUILD_ROWS
from xkv.backends.torch_cuda.kernels.rebuild_rows import QUERIES, launch
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Stored


class RebuildKeys:
    """:func:`xkv.ops.working_set.rebuild_keys`

    What :class:`~xkv.backends.torch_cuda.kernels.rebuild_rows.RebuildRows` reads, multiplies and
    writes, and the KV head's queries, ``M * dim`` numbers out of the L2 cache for each block of 32
    rows. It writes ``4 * M`` bytes of scores a row beside its key, which is not read again: the
    product takes it, rounded, from registers. ``2 * M * dim`` more flops a row, queries padded to
    16.
    """

    name = "rebuild_keys"

    def leading(self, stored: Stored, rows: Array, queries: Array) -> Array:
        """The basis."""
        return stored.basis

    def why_not(self, stored: Stored, rows: Array, queries: Array) -> str | None:
        """As :mod:`~xkv.backends.torch_cuda.kernels.rebuild_rows`; any number of queries."""
        if queries.dtype not in KERNEL_DTYPES:
            return f"the queries are {queries.dtype}; Triton kernels take 16- and 32-bit floats"
        return REBUILD_ROWS.why_not(stored, rows)

    def sample(
        self, backend: Backend, stored: Stored, rows: Array, queries: Array
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows, backwards, and as many of queries."""
        stored, ids = REBUILD_ROWS.sample(backend, stored, rows)
        head_dim = queries.shape[-1]
        drawn = backend.normal((2, 2, QUERIES + 1, head_dim), 2) * head_dim**-0.5
        return stored, ids, drawn.to(queries.dtype)

    def check_key(self, stored: Stored, rows: Array, queries: Array) -> tuple[Any, ...]:
        """Dtypes, head_dim, order of pairs, packed or not."""
        return *REBUILD_ROWS.check_key(stored, rows), queries.dtype

    def __call__(self, stored: Stored, rows: Array, queries: Array) -> tuple[Array, Array | None]:
        """``[B, n_kv_heads, n, dim]`` in the basis' dtype, and ``[B, n_kv_heads, M, n]`` float32"""
        return launch(stored, rows, queries)


KERNEL = RebuildKeys()
