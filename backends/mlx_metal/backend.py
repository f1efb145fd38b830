"""The MLX backend: what the array API standard has no word for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.kernels import (
    attend_dense,
    choose_rows,
    common,
    index_scores,
    key_scores,
    query_terms,
    weigh_rows,
)
from xkv.backends.mlx_metal.rotation import rotation_at
from xkv.ops.backend import MAX_TABLES, Backend
from xkv.ops.index import RUN
from xkv.ops.kernels import KernelDispatch, KernelMode
from xkv.ops.sequences import AnyDense, AnyLatent
from xkv.ops.types import Array, RopeSpec, Stored


class MLXBackend(Backend):
    """MLX on its default device: Metal on a Mac, the CPU elsewhere.

    Args:
        kernels: Whether Metal kernels run, see :class:`xkv.ops.kernels.KernelDispatch`.
    """

    name = "mlx"
    xp = mx

    def __init__(self, kernels: KernelMode = "auto") -> None:
        self.kernels = KernelDispatch(self, kernels, lambda: common.device_problem())
        self._freqs: dict[RopeSpec, Array] = {}
        self._ones: dict[Any, Array] = {}
        self._rotations: dict[RopeSpec, Callable[[Array, Array], Array]] = {}

    @property
    def placement(self) -> dict[str, Any]:
        return {}

    @property
    def device_name(self) -> str:
        if mx.default_device() == mx.Device(mx.cpu):
            return "cpu"
        return str(mx.device_info().get("device_name", "gpu"))

    def from_numpy(self, array: np.ndarray) -> Array:
        return mx.array(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)

    def evaluate(self, *arrays: Array) -> None:
        mx.eval(*arrays)

    def own(self, array: Array) -> Array:
        # mx.contiguous and assignment to a whole array may give a view of the same buffer
        return mx.concatenate([array[..., :0], array], axis=-1)

    def cholesky(self, x: Array) -> Array | None:
        # mx.linalg runs on the CPU only, and leaves a failed pivot on the diagonal without an error
        factor = mx.linalg.cholesky(x, stream=mx.cpu)
        positive = mx.all(mx.diagonal(factor, axis1=-2, axis2=-1) > 0)
        return factor if positive.item() else None

    def triangular_inverse(self, lower: Array) -> Array:
        return mx.linalg.tri_inv(lower, stream=mx.cpu)

    def eigh(self, x: Array) -> tuple[Array, Array]:
        # float64: the float32 routine mixes directions below 1e-3 of the largest
        wide = x.astype(mx.float64, stream=mx.cpu)
        values, vectors = mx.linalg.eigh(wide, stream=mx.cpu)
        return values.astype(x.dtype, stream=mx.cpu), vectors.astype(x.dtype, stream=mx.cpu)

    def attention(
        self, queries: Array, keys: Array, values: Array, scale: float, mask: Array | None
    ) -> Array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def rope(
        self, x: Array, positions: Array | int, spec: RopeSpec, inverse: bool = False
    ) -> Array:
        if not isinstance(positions, int):
            if inverse:
                return super().rope(x, positions, spec, inverse)
            if spec not in self._rotations:
                if len(self._rotations) >= MAX_TABLES:
                    del self._rotations[next(iter(self._rotations))]
                self._rotations[spec] = rotation_at(self, spec)
            return self._rotations[spec](x, positions)
        if spec not in self._freqs:
            self._freqs[spec] = self.constant(spec.freqs, mx.float32)
        freqs = self._freqs[spec]
        if spec.scale != 1:
            factor = 1 / spec.scale if inverse else spec.scale
            x = mx.concatenate([x[..., : spec.dims] * factor, x[..., spec.dims :]], axis=-1)
        return mx.fast.rope(
            x,
            spec.dims,
            traditional=spec.traditional,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=-freqs if inverse else freqs,
        )

    def split(self, x: Array, widths: Sequence[int]) -> Sequence[Array]:
        return list(mx.split(x, list(accumulate(widths))[:-1], axis=-1))

    def top_indices(self, scores: Array, count: int) -> Array:
        *lead, n = scores.shape
        if n < 2 * RUN * count:
            order = mx.argpartition(-scores, kth=min(count, n - 1), axis=-1)
            # int32: unsigned numbers would turn all row arithmetic into int64
            return order[..., :count].astype(mx.int32)
        # MLX sorts: all but the runs with the largest maxima, which have them all, are left out
        scores = mx.pad(scores, [*[(0, 0)] * len(lead), (0, -n % RUN)], constant_values=-mx.inf)
        runs = self.top_indices(scores.reshape(*lead, -1, RUN).max(axis=-1), count)
        numbers = (runs[..., None] * RUN + mx.arange(RUN)).reshape(*lead, -1)
        best = self.top_indices(mx.take_along_axis(scores, numbers, axis=-1), count)
        return mx.take_along_axis(numbers, best, axis=-1)

    def quantize(self, x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
        words, scales, biases = mx.quantize(x, group_size=group_size, bits=bits)
        return words, scales, biases

    def dequantize(self, packed: tuple[Array, ...], group_size: int, bits: int) -> Array:
        words, scales, biases = packed
        if mx.default_device() != mx.Device(mx.cpu):
            return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
        # one matrix of one row, times 1: the CPU's mx.dequantize takes 2 to 15 times as long
        words, scales, biases = (mx.reshape(x, (1, -1)) for x in packed)
        if scales.dtype not in self._ones:
            self._ones[scales.dtype] = mx.ones((1, 1), scales.dtype)
        one = self._ones[scales.dtype]
        row = mx.quantized_matmul(
            one, words, scales, biases, transpose=False, group_size=group_size, bits=bits
        )
        return mx.reshape(row, (*packed[1].shape[:-1], -1))

    def logsumexp(self, x: Array) -> Array:
        return mx.logsumexp(x, axis=-1)

    def put_along(self, x: Array, at: Array, values: Array) -> Array:
        at = at[..., None] if x.ndim > at.ndim else at
        return mx.put_along_axis(x, at, values.astype(x.dtype), axis=2)

    def add_product(self, x: Array, left: Array, right: Array) -> Array:
        return mx.addmm(x, left, right)

    def step_dtype(self, dtype: Any) -> Any:
        # the CPU multiplies 16-bit matrices slowly
        return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else dtype

    def active_memory(self) -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def choose_rows(self, worth: Array, count: int) -> Array:
        return self.kernels.run(
            "choose_rows", choose_rows.KERNEL, super().choose_rows, worth, count
        )

    def key_scores(self, stored: Stored, rows: Array, queries: Array) -> Array:
        return self.kernels.run(
            "key_scores", key_scores.KERNEL, super().key_scores, stored, rows, queries
        )

    def weigh_rows(
        self, latent: AnyLatent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        return self.kernels.run(
            "weigh_rows",
            weigh_rows.KERNEL,
            super().weigh_rows,
            *(latent, rows, scores, totals, beside),
        )

    def attend_dense(
        self, queries: Array, dense: AnyDense, sinks: Array | None
    ) -> tuple[Array, Array]:
        return self.kernels.run(
            "attend_dense", attend_dense.KERNEL, super().attend_dense, queries, dense, sinks
        )

    def query_terms(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        return self.kernels.run(
            "query_terms", query_terms.KERNEL, super().query_terms, queries, basis, spec
        )

    def index_scores(
        self, absorbed: Array, latent: AnyLatent, offsets: Array, n_kv_heads: int
    ) -> Array:
        return self.kernels.run(
            "index_scores",
            index_scores.KERNEL,
            super().index_scores,
            *(absorbed, latent, offsets, n_kv_heads),
        )
