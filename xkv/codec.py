"""Latents and bases in few bits: parts of neighbouring columns, each in MLX's affine layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from xkv.backend import Array, Backend

BAND = 64
"""Columns that share a number of bits, and in each row a scale and a bias."""

BASIS_GROUP = 128
"""Numbers of a basis, at most, that share a scale; at short prompts its bytes dominate."""

BITS = (2, 3, 4, 5, 6, 8, 16)
"""What a band can be stored in; 16 stands for the KV dtype itself."""


CLIPPED_SHARE = {2: 21 / 32, 3: 55 / 64, 4: 61 / 64}
"""Share of a group's range that so few bits cover; its largest numbers are cut to the edge.

For a normal distribution in groups of 64, mean squared errors fall from MLX's 0.155, 0.0362 and
0.0083 of the variance to 0.113, 0.0308 and 0.0077. The fractions are exact in bfloat16.
"""


def group_size_of(width: int, largest: int = BAND) -> int:
    """Numbers that share a scale in rows of ``width``; 0 where MLX's layout cannot hold them."""
    sizes = [size for size in (128, 64, 32) if size <= largest]
    return next((size for size in sizes if width % size == 0), 0)


def row_bytes(width: int, bits: int, item_bytes: int, largest_group: int = BAND) -> int:
    """Bytes of ``width`` numbers that are quantized together."""
    if bits == 16:
        return width * item_bytes
    return width * bits // 8 + width // group_size_of(width, largest_group) * 2 * item_bytes


def basis_row_bytes(head_dim: int, bits: int, item_bytes: int) -> int:
    """Bytes of a basis' row in one head."""
    return row_bytes(head_dim, bits, item_bytes, BASIS_GROUP)


class Part(NamedTuple):
    """A matrix in one number of bits, quantized along its last axis."""

    arrays: tuple[Array, ...]
    """The matrix alone at 16 bits, otherwise words, scales and biases."""
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        if self.bits == 16:
            return tuple(self.arrays[0].shape)
        *rest, n_groups = self.arrays[1].shape
        return (*rest, n_groups * self.group_size)

    def unpack(self, backend: Backend) -> Array:
        if self.bits == 16:
            return self.arrays[0]
        return backend.dequantize(self.arrays, self.group_size, self.bits)

    def map(self, function: Any) -> Part:
        """The part with each of its arrays changed along the axes before the last."""
        return self._replace(arrays=tuple(function(x) for x in self.arrays))


def pack_part(backend: Backend, x: Array, bits: int, largest_group: int = BAND) -> Part:
    """Columns of a latent ``[B, L, D]``, or with groups of up to ``BASIS_GROUP`` rows of a basis
    ``[B, n, n_kv_heads, D]``, in ``bits`` bits; 16 leaves them as they are."""
    if bits == 16:
        return Part((x,), 16, 0)
    group_size = group_size_of(x.shape[-1], largest_group)
    if bits not in CLIPPED_SHARE:
        return Part(backend.quantize(x, group_size, bits), bits, group_size)
    low, high = _clipped_range(backend, x, group_size, CLIPPED_SHARE[bits])
    xp = backend.xp
    groups = xp.reshape(x, (*low.shape[:-1], group_size))
    # MLX puts a code on zero, which costs range, but not where zero is an edge
    shifted = xp.reshape(xp.minimum(xp.clip(groups - low, 0, None), high - low), x.shape)
    words, scales, biases = backend.quantize(shifted, group_size, bits)
    return Part((words, scales, biases + low[..., 0]), bits, group_size)


def _clipped_range(
    backend: Backend, x: Array, group_size: int, share: float
) -> tuple[Array, Array]:
    """``[..., groups, 1]``: each group's range, drawn in towards its number nearest to zero."""
    xp = backend.xp
    groups = xp.reshape(x, (*x.shape[:-1], -1, group_size))
    low = xp.min(groups, axis=-1, keepdims=True)
    high = xp.max(groups, axis=-1, keepdims=True)
    center = xp.minimum(xp.clip(low, 0, None), high)
    return center + share * (low - center), center + share * (high - center)


@dataclass(frozen=True)
class Packed:
    """A latent or a basis, rank by rank in the bits that its singular values deserve. Immutable.

    Args:
        parts: Of a latent ``[B, L, r]`` neighbouring columns, of a basis ``[B, r, n_kv_heads,
            dim]`` neighbouring rows, in order.
        axis: 2 for a latent, 1 for a basis.
    """

    parts: tuple[Part, ...]
    axis: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    @classmethod
    def plain(cls, x: Array) -> Packed:
        """An array in its own dtype: a latent of three axes, a basis of four."""
        return cls((Part((x,), 16, 0),), 2 if len(x.shape) == 3 else 1)

    @property
    def array(self) -> Array | None:
        """The matrix, where it is one array in its own dtype."""
        return self.parts[0].arrays[0] if self.bits == (16,) else None

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each part."""
        return tuple(part.bits for part in self.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Ranks of each part."""
        return tuple(part.shape[self.axis] for part in self.parts)

    @property
    def rank(self) -> int:
        return sum(self.widths)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.axis], self.rank, *first[self.axis + 1 :])

    @property
    def dtype(self) -> Any:
        """Of the matrix."""
        return self._in_dtype.dtype

    @property
    def item_bytes(self) -> int:
        """Of a number in the matrix' dtype."""
        return self._in_dtype.itemsize

    @property
    def _in_dtype(self) -> Array:
        """An array in the matrix' dtype: the first part itself, or its scales."""
        return self.parts[0].arrays[0 if self.parts[0].bits == 16 else 1]

    @property
    def arrays(self) -> list[Array]:
        return [x for part in self.parts for x in part.arrays]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    def unpack(self, backend: Backend) -> Array:
        """The matrix as one array."""
        parts = [part.unpack(backend) for part in self.parts]
        # a latent's columns are its last axis, also where its rows were gathered by head
        axis = -1 if self.axis == 2 else self.axis
        return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=axis)

    def map(self, function: Any) -> Packed:
        """The matrix with each array changed along axes that no part is cut or quantized along."""
        return Packed(tuple(part.map(function) for part in self.parts), self.axis)

    def astype(self, backend: Backend, dtype: Any) -> Packed:
        """The same codes with numbers, scales and biases in another dtype."""
        parts = tuple(
            part._replace(
                arrays=(
                    *part.arrays[: part.bits != 16],
                    *(backend.xp.astype(x, dtype) for x in part.arrays[part.bits != 16 :]),
                )
            )
            for part in self.parts
        )
        return Packed(parts, self.axis)

    def leading(self, rank: int) -> Packed:
        """The first parts only, which together have this rank."""
        if rank == self.rank:
            return self
        ends = list(itertools.accumulate(self.widths))
        return Packed(self.parts[: ends.index(rank) + 1], self.axis)

    def rows(self, start: int, end: int) -> Packed:
        """Tokens ``start`` to ``end`` of a latent."""
        if start == 0 and end == self.shape[1]:
            return self
        return self.map(lambda x: x[:, start:end])

    def own(self, backend: Backend) -> Packed:
        """A copy that shares no memory."""
        return self.map(backend.own)

    def followed_by(self, backend: Backend, other: Packed) -> Packed:
        """A latent's tokens, then those of another with the same bits."""
        parts = tuple(
            mine._replace(
                arrays=tuple(
                    backend.xp.concat([x, y], axis=1)
                    for x, y in zip(mine.arrays, more.arrays, strict=True)
                )
            )
            for mine, more in zip(self.parts, other.parts, strict=True)
        )
        return Packed(parts, self.axis)

    def weighted_sum(self, backend: Backend, weights: Array) -> Array:
        """``weights @ latent``: ``[B, M, L]`` -> ``[B, M, r]``."""
        products = [
            weights @ part.arrays[0]
            if part.bits == 16
            else backend.quantized_matmul(
                weights, part.arrays, part.group_size, part.bits, transpose=False
            )
            for part in self.parts
        ]
        return products[0] if len(products) == 1 else backend.xp.concat(products, axis=-1)


def unpacked(backend: Backend, x: Array | Packed) -> Array:
    """A latent or a basis as one array, for this step only."""
    return x.unpack(backend) if isinstance(x, Packed) else x


def pack_latent(backend: Backend, x: Array, widths: Sequence[int], bits: Sequence[int]) -> Packed:
    """A latent ``[B, L, r]`` in parts of some columns each."""
    ends = np.cumsum(widths).tolist()
    parts = [
        pack_part(backend, x[..., end - width : end], n_bits)
        for end, width, n_bits in zip(ends, widths, bits, strict=True)
    ]
    return Packed(tuple(parts), 2)


def pack_basis(backend: Backend, x: Array, widths: Sequence[int], bits: Sequence[int]) -> Packed:
    """A basis ``[B, r, n_kv_heads, dim]`` in parts of some rows each."""
    ends = np.cumsum(widths).tolist()
    parts = [
        pack_part(backend, backend.own(x[:, end - width : end]), n_bits, BASIS_GROUP)
        for end, width, n_bits in zip(ends, widths, bits, strict=True)
    ]
    return Packed(tuple(parts), 1)


def small_latent(
    backend: Backend, like: Array | Packed, n_rows: int, rank: int, seed: int
) -> Array | Packed:
    """Random rows in a latent's form, for a check: ``rank`` columns, or a few in each part."""
    if isinstance(like, Packed):
        widths = [96 if part.group_size == 32 else 2 * BAND for part in like.parts]
        rank = sum(widths)
    drawn = backend.xp.astype(backend.normal((1, n_rows, rank), seed), like.dtype)
    return pack_latent(backend, drawn, widths, like.bits) if isinstance(like, Packed) else drawn
