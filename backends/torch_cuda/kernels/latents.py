"""How the Triton kernels read rows of a latent: one array, or parts of columns in few bits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from xkv.ops.packed import Packed
from xkv.ops.types import Factor

Layout = tuple[tuple[int, int], ...] | None
"""Bits and group size of each part of a packed latent; None for one in its own dtype."""


@triton.jit
def part_tile(
    numbers,
    scales,
    biases,
    width,
    rows,
    is_inside,
    columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Columns of a part's rows in the latent's dtype; zeros outside of it.

    At 16 bits ``scales`` is the stride of its rows.
    """
    is_read = is_inside[:, None] & (columns < width)[None, :]
    if BITS == 16:
        tile = tl.load(numbers + rows[:, None] * scales + columns[None, :], mask=is_read, other=0.0)
    else:
        # MLX's affine layout: one stream of bits, the lowest first
        first_bits = columns * BITS
        words = numbers + rows[:, None] * (width * BITS // 32) + (first_bits // 32)[None, :]
        shifts = (first_bits % 32)[None, :]
        codes = tl.load(words, mask=is_read, other=0).to(tl.uint32, bitcast=True) >> shifts
        if 32 % BITS != 0:
            is_cut = is_read & (shifts + BITS > 32)
            rest = tl.load(words + 1, mask=is_cut, other=0).to(tl.uint32, bitcast=True)
            # shifted by 32 it would be undefined, even where it is zero
            codes |= rest << ((32 - shifts) % 32)
        codes = codes & ((1 << BITS) - 1)
        groups = rows[:, None] * (width // GROUP) + (columns // GROUP)[None, :]
        scale = tl.load(scales + groups, mask=is_read, other=0.0).to(tl.float32)
        bias = tl.load(biases + groups, mask=is_read, other=0.0).to(tl.float32)
        tile = (codes.to(tl.float32) * scale + bias).to(scales.dtype.element_ty)
    return tile


def layout_of(latent: Factor) -> Layout:
    """What of a latent's form is compiled into a kernel."""
    if not isinstance(latent, Packed):
        return None
    return tuple((part.bits, part.group_size) for part in latent.parts)


def latent_arguments(latent: Factor) -> tuple[Any, Any, Any]:
    """A latent as kernels take it.

    Returns:
        The array and its strides of the batch and of rows. Of a packed one: three values a part
        (words, scales and biases, or the numbers, the stride of their rows and the numbers again),
        rows of a batch, each part's columns.
    """
    if not isinstance(latent, Packed):
        return latent, *latent.stride()[:2]
    values: list[Any] = []
    for part in latent.parts:
        first = part.arrays[0]
        values += (first, first.stride(1), first) if part.bits == 16 else part.arrays
    return tuple(values), int(_batch_rows(latent)[0]), latent.widths


def _batch_rows(latent: Packed) -> list[float]:
    """How many rows of each array lie between two of the batch."""
    return [x.stride(0) / x.stride(1) for x in latent.arrays]


def problem(latent: Factor) -> str | None:
    """What the kernels cannot take of a packed latent.

    Numbers of 16 bits may be columns of a wider array, as they are where they were packed.
    """
    if not isinstance(latent, Packed):
        return None
    batch_rows = _batch_rows(latent)
    are_side_by_side = all(
        x.stride(2) == 1 and (part.bits == 16 or x.stride(1) == x.shape[-1])
        for part in latent.parts
        for x in part.arrays
    )
    if not are_side_by_side or len(set(batch_rows)) > 1 or not batch_rows[0].is_integer():
        return "a packed latent's rows are strided; kernels read them side by side"
    return None
