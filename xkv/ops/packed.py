"""A matrix in few bits: parts of neighbouring columns, each in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xkv.ops.protocol import Operations
from xkv.ops.types import Array


def group_size_of(width: int, largest: int = 64) -> int:
    """Numbers that share a scale in rows of ``width``; 0 where MLX's layout cannot hold them."""
    sizes = [size for size in (128, 64, 32) if size <= largest]
    return next((size for size in sizes if width % size == 0), 0)


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

    def unpack(self, backend: Operations) -> Array:
        if self.bits == 16:
            return self.arrays[0]
        if 0 in self.shape:
            # no framework unpacks nothing
            dtype = self.arrays[1].dtype
            return backend.xp.zeros(self.shape, dtype=dtype, **backend.placement)
        return backend.dequantize(self.arrays, self.group_size, self.bits)

    def map(self, function: Any) -> Part:
        """The part with each of its arrays changed along the axes before the last."""
        return self._replace(arrays=tuple(function(x) for x in self.arrays))


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

    def unpack(self, backend: Operations) -> Array:
        """The matrix as one array."""
        parts = [part.unpack(backend) for part in self.parts]
        # a latent's columns are its last axis, also where its rows were gathered by head
        axis = -1 if self.axis == 2 else self.axis
        return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=axis)

    def map(self, function: Any) -> Packed:
        """The matrix with each array changed along axes that no part is cut or quantized along."""
        return Packed(tuple(part.map(function) for part in self.parts), self.axis)

    def astype(self, backend: Operations, dtype: Any) -> Packed:
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

    def rows(self, start: int, end: int) -> Packed:
        """Tokens ``start`` to ``end`` of a latent."""
        if start == 0 and end == self.shape[1]:
            return self
        return self.map(lambda x: x[:, start:end])

    def own(self, backend: Operations) -> Packed:
        """A copy that shares no memory."""
        return self.map(backend.own)

    @classmethod
    def joined(cls, backend: Operations, latents: Sequence[Packed]) -> Packed:
        """Latents with the same columns and bits, one after the other."""
        first, *later = latents
        if not later:
            return first
        parts = [
            part._replace(
                arrays=tuple(
                    backend.xp.concat(list(arrays), axis=1)
                    for arrays in zip(*(x.parts[i].arrays for x in latents), strict=True)
                )
            )
            for i, part in enumerate(first.parts)
        ]
        return cls(tuple(parts), first.axis)

    def weighted_sum(self, backend: Operations, weights: Array) -> Array:
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


def unpacked(backend: Operations, x: Array | Packed) -> Array:
    """A latent or a basis as one array, for this step only."""
    return x.unpack(backend) if isinstance(x, Packed) else x
