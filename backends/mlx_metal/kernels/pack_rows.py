"""Rows that enter a working set, in 8 bits: largest, quotient and rounding in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.slots import LARGEST
from xkv.ops.types import Array

# A simdgroup packs the key or the value of one row.
SOURCE = """
  const int part = threadgroup_position_in_grid.x, row = threadgroup_position_in_grid.y;
  const int lane = thread_index_in_simdgroup;
  const int n_heads = keys_shape[1], n_rows = keys_shape[2];
  const int64_t kv_head = threadgroup_position_in_grid.z;
  const int64_t batch = kv_head / n_heads, head = kv_head % n_heads;
  const int key_dim = keys_shape[3], value_dim = values_shape[3];
  const int dim = part == 0 ? key_dim : value_dim;
  const int64_t stride = part == 0 ? keys_strides[3] : values_strides[3];
  const device T* from =
      part == 0
          ? keys + batch * keys_strides[0] + head * keys_strides[1] + row * keys_strides[2]
          : values + batch * values_strides[0] + head * values_strides[1] + row * values_strides[2];
  const int64_t at = kv_head * n_rows + row;
  device int8_t* to = out + at * (key_dim + value_dim) + part * key_dim;

  float largest = 0.0f;
  for (int i = lane; i < dim; i += 32) largest = max(largest, fabs(float(from[i * stride])));
  const float scale = simd_max(largest) / LARGEST;
  // a row of zeros is divided by 1
  const float divisor = scale > 0.0f ? scale : 1.0f;
  for (int i = lane; i < dim; i += 32) to[i] = int8_t(rint(float(from[i * stride]) / divisor));
  if (lane == 0) scales[at * 2 + part] = scale;
"""


class PackRows:
    """The kernel of :func:`xkv.ops.slots.pack_rows`.

    Limits: keys and values of one dtype, float32, float16 or bfloat16. Any dims, strides and number
    of rows. Quotients are in float32.

    For each row and KV head: ``key_dim + value_dim`` elements read twice, the second time from
    cache, as many bytes and 8 written, and 2 operations an element: at most 32 rows enter a layer's
    slots in a step, with 8 KV heads of dim 128 in 16 bits 0.2 MB. The plain twin reads and writes
    ten times as much in ten launches.

    One source for all dims.
    """

    name = "pack_rows"

    def why_not(self, keys: Array, values: Array) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        if keys.shape[2] == 0:
            return "no rows are to be packed"
        return common.dtype_problem(keys=keys, values=values) or common.size_problem(keys, values)

    def sample(self, backend: Backend, keys: Array, values: Array) -> tuple[Any, ...]:
        """Several of everything, more features than lanes, and a row of zeros."""
        drawn = backend.normal((2, 2, 5, 40), 0)
        drawn[0, 1, 2] = 0
        return drawn.astype(keys.dtype), backend.normal((2, 2, 5, 72), 1).astype(values.dtype)

    def check_key(self, keys: Array, values: Array) -> tuple[Any, ...]:
        """The dtype's name."""
        return (common.dtype_name(keys),)

    def __call__(self, keys: Array, values: Array) -> tuple[Array, Array]:
        batch, n_heads, n_rows, key_dim = keys.shape
        shape = batch, n_heads, n_rows
        kernel = common.build(
            self.name, ("keys", "values"), SOURCE, "", ("out", "scales"), reads_strides=True
        )
        numbers, scales = kernel(
            inputs=[keys, values],
            template=[("T", keys.dtype), ("LARGEST", LARGEST)],
            grid=(2 * common.SIMDGROUP, n_rows, batch * n_heads),
            threadgroup=(common.SIMDGROUP, 1, 1),
            output_shapes=[(*shape, key_dim + values.shape[-1]), (*shape, 2)],
            output_dtypes=[mx.int8, mx.float32],
        )
        return numbers, scales


KERNEL = PackRows()
