"""How the Triton kernels read a latent: one matrix, or bands of columns in few bits.

Bits come from a table on the device and the rest of a latent's form in arguments, so that a store
of other bits or another rank compiles nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import WORD_BITS, Latent
from xkv.ops.sequences import AnyLatent
from xkv.ops.types import Array
from xkv.store.codec import BITS, pack_latent

LATENT_ARGUMENTS = (
    *("numbers", "numbers_batch", "numbers_row", "scales", "biases", "scales_batch", "scales_row"),
    *("bands", "rank"),
)
"""Parameters of a kernel that :func:`latent_arguments` fills; none is specialized."""
ROWS_ARGUMENTS = "rows", "rows_batch", "rows_head"
"""Parameters of a kernel that :func:`rows_arguments` fills."""


@triton.jit
def band_columns(numbers, scales, biases, bands, band, first, is_inside, N_COLUMNS: tl.constexpr):
    """``N_COLUMNS`` of a packed band's 64 columns from ``first`` on, both multiples of 4, float32.

    ``numbers``, ``scales`` and ``biases`` point to rows, ``[N]``; zeros for rows not inside.
    """
    bits, first_word = tl.load(bands + 2 * band), tl.load(bands + 2 * band + 1)
    # MLX's affine layout: one stream of bits, the lowest first; 4 codes are in two words at most
    first_bits = (first + 4 * tl.arange(0, N_COLUMNS // 4)) * bits
    shifts = (first_bits % 32)[None, :]
    words = numbers[:, None] + (first_word + first_bits // 32)[None, :]
    codes = tl.load(words, mask=is_inside[:, None], other=0).to(tl.uint32, bitcast=True) >> shifts
    is_cut = is_inside[:, None] & (shifts + 4 * bits > 32)
    rest = tl.load(words + 1, mask=is_cut, other=0).to(tl.uint32, bitcast=True)
    # shifted by 32 it would be undefined, even where it is zero
    codes |= rest << ((32 - shifts) % 32)
    even = tl.interleave(codes, codes >> (2 * bits))
    odd = tl.interleave(codes >> bits, codes >> (3 * bits))
    codes = tl.interleave(even, odd) & ((1 << bits) - 1)
    scale = tl.load(scales + band, mask=is_inside, other=0.0).to(tl.float32)
    bias = tl.load(biases + band, mask=is_inside, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * scale[:, None] + bias[:, None]


@triton.jit
def plain_columns(numbers, columns, rank, is_inside, IS_ALIGNED: tl.constexpr):
    """Columns of rows of a matrix, ``numbers`` pointing to rows; zeros outside."""
    is_column = columns < rank
    pointers = numbers[:, None] + columns[None, :]
    if IS_ALIGNED:
        # said so that the compiler sees it, which loads 16 bytes at a time only then
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 16))
        is_column = columns // 16 < rank // 16
    return tl.load(pointers, mask=is_inside[:, None] & is_column[None, :], other=0.0)


@lru_cache(maxsize=256)
def band_table(bits: tuple[int, ...], device: torch.device) -> Array:
    """Bits and first word of each band; kept, since a copy to the device would stall a step."""
    firsts = [sum(bits[:n]) * BAND // WORD_BITS for n in range(len(bits))]
    rows = list(zip(bits, firsts, strict=True)) or [(0, 0)]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def latent_arguments(latent: Latent) -> dict[str, Any]:
    """A latent as kernels take it: :data:`LATENT_ARGUMENTS` and what is compiled in."""
    numbers, scales, biases = latent.arrays if latent.is_packed else latent.arrays * 3
    values = (numbers, *numbers.stride()[:2], scales, biases, *scales.stride()[:2])
    values += band_table(latent.bits, numbers.device), latent.rank
    return dict(zip(LATENT_ARGUMENTS, values, strict=True)) | latent_constants(latent)


def latent_constants(latent: Latent) -> dict[str, bool]:
    """What of a latent is compiled into a kernel."""
    x = latent.arrays[0]
    is_aligned = all(n % 16 == 0 for n in (x.storage_offset(), *x.stride()[:2], x.shape[2]))
    return {"IS_PACKED": latent.is_packed, "IS_ALIGNED": is_aligned and not latent.is_packed}


def rows_arguments(rows: Array) -> dict[str, Any]:
    """Row numbers ``[B, n_kv_heads, n]`` as kernels take them, :data:`ROWS_ARGUMENTS`.

    Those that a step rebuilds are the first of a longer array, which is not to be copied.
    """
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    return dict(zip(ROWS_ARGUMENTS, (rows, *rows.stride()[:2]), strict=True))


def latent_problem(latent: AnyLatent) -> str | None:
    """What the kernels cannot take of a latent."""
    if not isinstance(latent, Latent):
        return "Triton kernels take the latent of one batch, not several sequences' own"
    if latent.dtype not in KERNEL_DTYPES:
        return f"the latent is {latent.dtype}; Triton kernels take 16- and 32-bit floats"
    # an axis of one number may have any stride
    if any(x.stride(2) != 1 and x.shape[2] > 1 for x in latent.arrays):
        return "a latent's columns are strided; kernels read them side by side"
    if len({x.stride()[:2] for x in latent.arrays[1:]}) > 1:
        return "a latent's scales and biases differ in strides"
    return None


def sample_latent(backend: Backend, latent: Latent, n_rows: int) -> Latent:
    """A small latent of the same form, two sequences of it, with every number of bits."""
    rank = len(BITS) * BAND if latent.is_packed else latent.rank
    numbers = backend.normal((2, n_rows, rank), 0).to(latent.dtype)
    return pack_latent(backend, numbers, BITS[::-1] if latent.is_packed else ())
