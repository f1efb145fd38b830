"""Rows that enter a working set, in 8 bits: largest, quotient and rounding in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
from xkv.ops.backend import Backend
from xkv.ops.slots import LARGEST
from xkv.ops.types import Array

WHOLE = 1.5 * 2**23
"""Added to a small float32 it leaves the nearest whole number, of two the even one."""


@triton.jit
def pack_part(x, to, scale_to, columns, dim, LARGEST_NUMBER: tl.constexpr, ADDED: tl.constexpr):
    """One row's key or value."""
    is_inside = columns < dim
    x = tl.load(x + columns, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.math.div_rn(tl.max(tl.abs(x), axis=0), LARGEST_NUMBER * 1.0)
    # a row of zeros is divided by 1
    quotient = tl.math.div_rn(x, tl.where(scale > 0, scale, 1.0))
    tl.store(to + columns, (quotient + ADDED - ADDED).to(tl.int8), mask=is_inside)
    tl.store(scale_to, scale)


@triton.jit(
    do_not_specialize=[
        *("keys", "keys_batch", "keys_head", "keys_row", "values", "values_batch", "values_head"),
        *("values_row", "n_rows", "n_heads", "key_dim", "value_dim"),
    ]
)
def pack_rows_kernel(
    keys,
    keys_batch,
    keys_head,
    keys_row,
    values,
    values_batch,
    values_head,
    values_row,
    numbers,
    scales,
    n_rows,
    n_heads,
    key_dim,
    value_dim,
    N_FEATURES: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    ADDED: tl.constexpr,
):
    row, head_of_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = head_of_batch // n_heads, head_of_batch % n_heads
    place = head_of_batch * n_rows + row
    keys += batch * keys_batch + head * keys_head + row * keys_row
    values += batch * values_batch + head * values_head + row * values_row
    numbers += place * (key_dim + value_dim)
    scales += 2 * place
    columns = tl.arange(0, N_FEATURES)
    pack_part(keys, numbers, scales, columns, key_dim, LARGEST_NUMBER, ADDED)
    pack_part(values, numbers + key_dim, scales + 1, columns, value_dim, LARGEST_NUMBER, ADDED)


class PackRows:
    """:func:`xkv.ops.slots.pack_rows`

    A program takes a row: it reads ``key_dim + value_dim`` elements and writes as many bytes and 8.
    """

    name = "pack_rows"

    def leading(self, keys: Array, values: Array) -> Array:
        """The keys."""
        return keys

    def why_not(self, keys: Array, values: Array) -> str | None:
        """Any dims and numbers of rows; the features side by side."""
        if values.dtype not in KERNEL_DTYPES:
            return f"the values are {values.dtype}; Triton kernels take 16- and 32-bit floats"
        if any(x.stride(3) != 1 and x.shape[3] > 1 for x in (keys, values)):
            return "rows are strided; the kernel reads their features side by side"
        return None

    def sample(self, backend: Backend, keys: Array, values: Array) -> tuple[Any, ...]:
        """Several of everything, and a row of zeros; the features are as many."""
        found = [
            backend.normal((2, 2, 3, x.shape[-1]), seed) for seed, x in enumerate((keys, values))
        ]
        found[0][0, 1, 2] = 0
        return found[0].to(keys.dtype), found[1].to(values.dtype)

    def check_key(self, keys: Array, values: Array) -> tuple[Any, ...]:
        """Dtypes, and features to the next power of two."""
        dtypes = str(keys.dtype).removeprefix("torch."), values.dtype
        return *dtypes, triton.next_power_of_2(max(keys.shape[-1], values.shape[-1]))

    def __call__(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """``numbers`` and ``scales`` of :class:`xkv.ops.slots.Slots`"""
        batch, n_heads, n_rows, key_dim = keys.shape
        value_dim, shape = values.shape[-1], (batch, n_heads, n_rows)
        numbers, scales = (
            torch.empty((*shape, last), dtype=dtype, device=keys.device)
            for last, dtype in ((key_dim + value_dim, torch.int8), (2, torch.float32))
        )
        if n_rows == 0:
            return numbers, scales
        pack_rows_kernel[(n_rows, batch * n_heads)](
            keys=keys,
            keys_batch=keys.stride(0),
            keys_head=keys.stride(1),
            keys_row=keys.stride(2),
            values=values,
            values_batch=values.stride(0),
            values_head=values.stride(1),
            values_row=values.stride(2),
            numbers=numbers,
            scales=scales,
            n_rows=n_rows,
            n_heads=n_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            N_FEATURES=triton.next_power_of_2(max(key_dim, value_dim)),
            LARGEST_NUMBER=LARGEST,
            ADDED=WHOLE,
            num_warps=1,
        )
        return numbers, scales


KERNEL = PackRows()
