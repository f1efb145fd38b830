"""Codes of a rotated head: as few bits as a normal distribution can be told in."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.ops.types import Array
from xkv.planning.document import Document

MOST_BITS = 6


@dataclass(frozen=True)
class LloydMax(Method):
    """Every row in few bits after a rotation that makes its features alike: TurboQuant's kind.

    Each head is rotated by a Hadamard matrix times random signs (blocks of one, where the head is
    no power of two), so that its features are close to normal. Each becomes the nearest level of
    the quantizer with the least squared error for that distribution, times one 16-bit scale a
    group, which is fitted to the chosen levels. Keys are coded after the rotary embedding, values
    alike; nothing is dropped. The bytes are the codes' and the scales': 4 bits are 4.25 with
    groups of 64.

    The paper draws a dense rotation, holds one norm a vector, and has a second form with a residual
    bit for inner products, which is not here. Ours is no copy of any of the packages that go by
    its name.

    Args:
        bits: 1 to 6.
        group_size: Features that share a scale.

    Source: TurboQuant, arXiv:2504.19874 (form for squared error); levels: Max, "Quantizing for
    minimum distortion", 1960.
    """

    name = "lloydmax"
    has_free_size = False

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise InputError(f"bits={self.bits} must be 1 to {MOST_BITS}")
        if self.group_size < 1:
            raise InputError(f"group_size={self.group_size} must be at least 1")

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        restored, held = [], 0
        for rows in (*document.keys, *document.values):
            if rows.shape[-1] % self.group_size:
                raise InputError(
                    f"heads of {rows.shape[-1]} features cannot be coded in groups of "
                    f"{self.group_size}: choose a group_size that divides them"
                )
            n_groups = math.prod(rows.shape) // self.group_size
            held += n_groups * (-(-self.bits * self.group_size // 8) + 2)
            restored.append(self._restore(document, rows))
            document.backend.evaluate(restored[-1])
        n_layers = len(document.keys)
        return compressed_rows(document, held, restored[:n_layers], restored[n_layers:])

    def _restore(self, document: Document, rows: Array) -> Array:
        """What comes back of one layer's keys or values, in float32."""
        backend, xp = document.backend, document.backend.xp
        dim = rows.shape[-1]
        size = dim & -dim  # the largest power of two that divides it
        turn = backend.from_numpy(_rotation(size, document.seed))
        turned = xp.reshape(xp.astype(rows, xp.float32), (-1, size)) @ turn
        groups = xp.reshape(turned, (-1, self.group_size))
        scale = xp.sqrt(xp.sum(groups * groups, axis=-1, keepdims=True) / self.group_size)
        for _ in range(2):
            levels = self._nearest(document, groups, scale)
            fitted = xp.sum(groups * levels, axis=-1, keepdims=True)
            fitted = fitted / xp.sum(levels * levels, axis=-1, keepdims=True)
            scale = xp.astype(xp.astype(fitted, xp.float16), xp.float32)
        back = xp.reshape(scale * levels, (-1, size)) @ xp.matrix_transpose(turn)
        return xp.reshape(back, rows.shape)

    def _nearest(self, document: Document, groups: Array, scale: Array) -> Array:
        """The level of each number, in units of its group's scale."""
        xp, levels = document.backend.xp, normal_levels(self.bits)
        nearest = xp.zeros_like(groups) + levels[0]
        for lower, upper in itertools.pairwise(levels):
            is_above = groups > scale * ((lower + upper) / 2)
            nearest = nearest + xp.where(is_above, upper - lower, 0.0)
        return nearest


@functools.cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The ``2 ** bits`` levels with the least squared error for standard normal numbers.

    Found by Lloyd's iteration: each level is the mean of what is nearest to it.
    """
    levels = np.linspace(-2.0, 2.0, 2**bits)
    for _ in range(20_000):
        bounds = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
        density = np.array([math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in bounds])
        below = np.array([(1 + math.erf(x / math.sqrt(2))) / 2 for x in bounds])
        before, levels = levels, (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        if np.abs(levels - before).max() < 1e-9:
            break
    return tuple(levels.tolist())


def _rotation(size: int, seed: int) -> np.ndarray:
    """Random signs times Sylvester's Hadamard matrix: orthogonal, of a power of two."""
    turn = np.ones((1, 1))
    while len(turn) < size:
        turn = np.block([[turn, turn], [turn, -turn]])
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size)
    return (signs[:, None] * turn / math.sqrt(size)).astype(np.float32)
