"""A basis in few bits: parts of neighbouring rows, each in MLX's affine layout."""

from __future__ import annotations

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
        return backend.dequantize(self.arrays, self.group_size, self.bits)

    def map(self, function: Any) -> Part:
        """The part with each of its arrays changed along the axes before the last."""
        return self._replace(arrays=tuple(function(x) for x in self.arrays))


@dataclass(frozen=True)
class Packed:
    """A layer's part of a basis, each row in the bits that its direction deserves. Immutable.

    Args:
        parts: Of ``[B, r, n_kv_heads, dim]`` neighbouring rows, in order.
    """

    parts: tuple[Part, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self

    @classmethod
    def plain(cls, x: Array) -> Packed:
        """A basis in its own dtype."""
        return cls((Part((x,), 16, 0),))

    @property
    def bits(self) -> tuple[int, ...]:
        """Of each part."""
        return tuple(part.bits for part in self.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(part.shape[1] for part in self.parts)

    @property
    def rank(self) -> int:
        return sum(self.widths)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (first[0], self.rank, *first[2:])

    @property
    def arrays(self) -> list[Array]:
        return [x for part in self.parts for x in part.arrays]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    def unpack(self, backend: Operations) -> Array:
        """The basis as one array, for this step only."""
        parts = [part.unpack(backend) for part in self.parts]
        return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=1)

    def map(self, function: Any) -> Packed:
        """The basis with each array changed along axes that no part is cut or quantized along."""
        return Packed(tuple(part.map(function) for part in self.parts))

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
        return Packed(parts)
