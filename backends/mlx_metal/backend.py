"""The MLX backend: what the array API standard has no word for."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.kernels import (
    chunk_scores,
    common,
    lowrank_attention,
    reconstruct_rows,
    selected_attention,
)
from xkv.ops.backend import Backend
from xkv.ops.kernels import KernelDispatch, KernelMode
from xkv.ops.types import Array, Landmarks, RopeSpec, Segment


class MLXBackend(Backend):
    """MLX on its default device: Metal on a Mac, the CPU elsewhere.

    Args:
        kernels: Whether Metal kernels run, see :class:`xkv.ops.kernels.KernelDispatch`.
    """

    name = "mlx"
    xp = mx

    def __init__(self, kernels: KernelMode = "auto") -> None:
        self.kernels = KernelDispatch(self, kernels, lambda: common.device_problem())
        self._lowrank_attention = lowrank_attention.LowrankAttention(self)
        self._selected_attention = selected_attention.SelectedAttention(self)
        self._freqs: dict[RopeSpec, Array] = {}
        self._rotations: dict[tuple[int, RopeSpec], Callable[[Array, Array], Array]] = {}

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
            return super().rope(x, positions, spec, inverse)
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

    def rotate_runs(self, x: Array, starts: Array, run_length: int, spec: RopeSpec) -> Array:
        # about 25 small operations, fused by mx.compile into a few
        key = (run_length, spec)
        if key not in self._rotations:
            plain = super().rotate_runs
            self._rotations[key] = mx.compile(
                lambda rows, begins: plain(rows, begins, run_length, spec)
            )
        return self._rotations[key](x, starts)

    def top_indices(self, scores: Array, count: int) -> Array:
        order = mx.argpartition(-scores, kth=min(count, scores.shape[-1] - 1), axis=-1)
        # int32: unsigned numbers would turn all row arithmetic into int64
        return order[..., :count].astype(mx.int32)

    def quantize(self, x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
        words, scales, biases = mx.quantize(x, group_size=group_size, bits=bits)
        return words, scales, biases

    def dequantize(self, packed: tuple[Array, ...], group_size: int, bits: int) -> Array:
        words, scales, biases = packed
        return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)

    def quantized_matmul(
        self,
        x: Array,
        packed: tuple[Array, ...],
        group_size: int,
        bits: int,
        transpose: bool = True,
    ) -> Array:
        words, scales, biases = packed
        if mx.default_device() == mx.Device(mx.cpu):
            # the CPU's quantized_matmul takes up to fifty times as long as widening the codes
            if bits == 8 and transpose:
                return self._widened_product(x, packed, group_size)
            matrix = self.dequantize(packed, group_size, bits)
            matrix = matrix.swapaxes(-1, -2) if transpose else matrix
            return (x.astype(mx.float32) @ matrix.astype(mx.float32)).astype(x.dtype)
        return mx.quantized_matmul(
            x, words, scales, biases, transpose=transpose, group_size=group_size, bits=bits
        )

    def _widened_product(self, x: Array, packed: tuple[Array, ...], group_size: int) -> Array:
        """``x @ dequantize(packed)^T`` of 8-bit codes without the dequantized matrix."""
        words, scales, biases = packed
        codes = mx.view(words, mx.uint8).astype(mx.float32).swapaxes(-1, -2)
        products = []
        for i in range(scales.shape[-1]):
            group = slice(i * group_size, (i + 1) * group_size)
            left = x[..., group].astype(mx.float32)
            product = (left @ codes[..., group, :]) * scales[..., None, :, i]
            products.append(product + left.sum(-1, keepdims=True) * biases[..., None, :, i])
        return functools.reduce(mx.add, products).astype(x.dtype)

    def active_memory(self) -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def lowrank_attention(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> Array:
        return self.kernels.run(
            "lowrank_attention",
            self._lowrank_attention,
            super().lowrank_attention,
            *(queries, segment, keys, values, scale, mask),
        )

    def reconstruct_rows(self, segment: Segment, rows: Array) -> Array:
        return self.kernels.run(
            "reconstruct_rows", reconstruct_rows.KERNEL, super().reconstruct_rows, segment, rows
        )

    def chunk_scores(self, queries: Array, landmarks: Landmarks, scale: float) -> Array:
        return self.kernels.run(
            "chunk_scores", chunk_scores.KERNEL, super().chunk_scores, queries, landmarks, scale
        )

    def selected_attention(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> Array:
        return self.kernels.run(
            "selected_attention",
            self._selected_attention,
            super().selected_attention,
            *(queries, segment, chunks, chunk_size, keys, values, scale),
        )
