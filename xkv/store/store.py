"""What a group's layers share of their keys, or values: a packed latent in a basis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.packed import Packed
from xkv.ops.types import Array
from xkv.store.codec import pack_latent
from xkv.store.linear_algebra import energy, inverse

CHUNK_ROWS = 4096
"""Tokens that are widened to float32 at once, of all layers of a group."""

WEAK_DIRECTION = 0.02
"""A basis of more rows than columns is not trusted where it is weaker than this share of it."""

ReadRows = Callable[[int, int], list[Array]]
"""Rows ``start`` to ``end`` of each layer, ``[B, L, n_kv_heads, dim]`` in float32 or wider."""


class Basis(NamedTuple):
    """Directions of a group's keys, or values, and the bits of a row's coordinates in them."""

    layers: tuple[Packed, ...]
    """One per layer, ``[B, r, n_kv_heads, dim]``; with ``is_shared`` B is 1."""
    bits: tuple[int, ...] = ()
    """Of each band of a row's coordinates; none where they stay in the KV dtype."""
    is_shared: bool = False
    """Whether it is the model's: held once for all its conversations, orthonormal, and found by
    name; otherwise it is this prompt's own."""

    index_rows: tuple[Array, ...] = ()
    """Of the model's, for each layer: :func:`xkv.ops.index.rows_of_index`."""

    scales: Array | None = None
    """``[width]``: how much an error in each column of the joint rows counts, as a factor. In rows
    that are multiplied by them the basis is orthonormal, and errors are measured there."""

    @property
    def nbytes(self) -> int:
        """Bytes that a conversation holds for it."""
        return 0 if self.is_shared else sum(x.nbytes for x in self.layers)


class Store(NamedTuple):
    """A latent and its basis. Immutable: appending makes another one, and the old stays valid."""

    basis: Basis
    latent: Latent
    """``[B, L, r]``"""
    total: float
    """Sum of squares of all rows that came in, in the basis' scales."""
    lost: float
    """What of it the store does not give back."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self

    @property
    def error(self) -> float:
        """Relative error of the rows."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The latent, without the basis."""
        return self.latent.arrays

    @property
    def nbytes(self) -> int:
        """Bytes of the latent, and of the basis where it is the prompt's own."""
        return self.latent.nbytes + self.basis.nbytes

    def parts(self) -> list[tuple[int, int, int]]:
        """``(columns, bits of the latent, bits of the basis)`` of each run of columns."""
        first, rank = self.basis.layers[0], self.latent.rank
        bits = self.basis.bits or (16,)
        columns = zip(
            itertools.chain.from_iterable(itertools.repeat(n, rank // len(bits)) for n in bits),
            itertools.chain.from_iterable(map(itertools.repeat, first.bits, first.widths)),
            strict=True,
        )
        return [(len(list(run)), *each) for each, run in itertools.groupby(columns)]


def store_rows(
    backend: Backend, basis: Basis, read: ReadRows, n_rows: int, dtype: Any, before: Store | None
) -> Store:
    """Project rows on a basis and pack them, a chunk at a time.

    Args:
        basis: With rows that are orthonormal but for their rounding.
        read: Gives the rows.
        n_rows: How many there are.
        dtype: The KV dtype.
        before: What they follow, with the same basis and as many sequences; only rows in use.

    Raises:
        InputError: If a row is not finite; then nothing was changed.
    """
    xp = backend.xp
    latents = [] if before is None else [before.latent]
    total, lost = (0.0, 0.0) if before is None else (before.total, before.lost)
    matrix = gram = solve = None
    for start in range(0, n_rows, CHUNK_ROWS):
        layers = read(start, min(start + CHUNK_ROWS, n_rows))
        rows = joined(backend, layers)
        if basis.scales is not None:
            rows = rows * basis.scales
        if matrix is None:
            matrix = xp.concat([_flat(backend, x, rows.dtype) for x in basis.layers], axis=-1)
            matrix = matrix if basis.scales is None else matrix * basis.scales
            if not basis.is_shared:
                gram = matrix @ xp.matrix_transpose(matrix)
                solve = _least_squares(backend, matrix, gram)
        projected = rows @ xp.matrix_transpose(matrix)
        latent = projected if solve is None else projected @ solve
        packed = pack_latent(backend, xp.astype(latent, dtype), basis.bits)
        backend.evaluate(*packed.arrays)
        given = xp.astype(packed.unpack(backend), rows.dtype)
        back = given if gram is None else given @ gram
        # |x - y B|^2 without the product y B
        part = energy(backend, rows)
        rest = backend.to_numpy(xp.sum(given * (back - 2 * projected), axis=-1)).sum(dtype=float)
        refuse_overflow(part + float(rest))
        total, lost = total + part, lost + max(part + float(rest), 0.0)
        latents.append(packed)
    latent = Latent.joined(backend, latents)
    backend.evaluate(*latent.arrays)
    return Store(basis, latent, total, lost)


def joined(backend: Backend, layers: Sequence[Array]) -> Array:
    """Layers' rows side by side, ``[B, L, width]``."""
    shape = (*layers[0].shape[:2], -1)
    return backend.xp.concat([backend.xp.reshape(x, shape) for x in layers], axis=-1)


def refuse_overflow(total: float) -> None:
    """Raise if rows whose squares sum to this are not finite."""
    if not math.isfinite(total):
        raise InputError(
            "the cache holds NaN or infinity, which cannot be compressed: the model's activations "
            "overflow; run it with the full cache, or in bfloat16"
        )


def _least_squares(backend: Backend, matrix: Array, gram: Array) -> Array:
    """What turns products with a rounded basis into the coordinates that fit best."""
    xp = backend.xp
    if matrix.shape[-2] <= matrix.shape[-1]:
        return inverse(backend, gram)
    # the last band is filled up: there are directions that are rounding alone, and large numbers
    # along them would set the scale by which all others of a row are rounded
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    mean = xp.sum(gram * eye, axis=(-2, -1), keepdims=True) / gram.shape[-1]
    return gram @ inverse(backend, gram @ gram + (WEAK_DIRECTION * mean) ** 2 * eye)


def _flat(backend: Backend, basis: Packed, dtype: Any) -> Array:
    """A layer's basis as ``[B, r, n_kv_heads * dim]``."""
    rows = backend.xp.astype(basis.unpack(backend), dtype)
    return backend.xp.reshape(rows, (*rows.shape[:2], -1))
