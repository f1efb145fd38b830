"""The PyTorch backend: the reference in float64 on the CPU, and the same code on CUDA."""

from __future__ import annotations

import gc
import logging
import resource
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import array_api_compat.torch
import numpy as np
import torch

from xkv.backends.torch_cuda import bit_packing
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.ops.backend import Backend
from xkv.ops.kernels import KernelDispatch, KernelMode
from xkv.ops.latent import Latent
from xkv.ops.scores import Dense
from xkv.ops.types import Array, RopeSpec, Stored

logger = logging.getLogger("xkv")

xp = SimpleNamespace(**vars(array_api_compat.torch))
# without a copy where nothing is to be converted, as MLX does
xp.astype = lambda x, dtype: x.to(dtype)


class TorchBackend(Backend):
    """PyTorch on one device.

    Args:
        device: Default: CUDA if there is one, else the CPU.
        kernels: As in :class:`xkv.ops.kernels.KernelDispatch`.
    """

    name = "torch"
    xp = xp

    def __init__(
        self, device: str | torch.device | None = None, kernels: KernelMode = "auto"
    ) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or default)
        self._constants: dict[tuple[tuple[float, ...], Any], Array] = {}
        reason = triton_kernels.why_no_kernels(self.device)
        if kernels == "auto" and self.device.type != "cuda" and reason is not None:
            # nothing is amiss: without a GPU these plain operations are what was asked for
            logger.info("attention runs on plain operations: %s", reason)
            kernels = "off"
        self.kernels = KernelDispatch(
            self, kernels, lambda: triton_kernels.why_no_kernels(self.device)
        )

    @property
    def placement(self) -> dict[str, Any]:
        return {"device": self.device}

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def constant(self, values: Sequence[float], dtype: Any) -> Array:
        # kept: a copy from the host waits for all that the device has queued
        key = (tuple(values), dtype)
        if key not in self._constants:
            self._constants[key] = super().constant(values, dtype)
        return self._constants[key]

    def from_numpy(self, array: np.ndarray) -> Array:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def to_numpy(self, array: Array) -> np.ndarray:
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    def evaluate(self, *arrays: Array) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def own(self, array: Array) -> Array:
        return array.clone(memory_format=torch.contiguous_format)

    def cholesky(self, x: Array) -> Array | None:
        factor, info = torch.linalg.cholesky_ex(x)
        return None if bool(info.any()) else factor

    def triangular_inverse(self, lower: Array) -> Array:
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)

    def eigh(self, x: Array) -> tuple[Array, Array]:
        # in float32 CUDA's is off by 3e-4 at 384 columns, and slower
        values, vectors = torch.linalg.eigh(x.double() if x.is_cuda else x)
        return values.to(x.dtype), vectors.to(x.dtype)

    def attention(
        self, queries: Array, keys: Array, values: Array, scale: float, mask: Array | None
    ) -> Array:
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def split(self, x: Array, widths: Sequence[int]) -> Sequence[Array]:
        return torch.split(x, list(widths), -1)

    def top_indices(self, scores: Array, count: int) -> Array:
        count = min(count, scores.shape[-1])
        return torch.topk(scores, count, dim=-1, sorted=False).indices

    def product_dtype(self, dtype: Any) -> Any:
        is_short = dtype in (torch.float16, torch.bfloat16)
        return dtype if self.device.type == "cuda" and is_short else None

    def wide_product(self, left: Array, right: Array) -> Array:
        if self.device.type == "cpu":
            return super().wide_product(left, right)
        batches = [x.reshape(-1, *x.shape[-2:]) for x in (left, right)]
        product = torch.bmm(batches[0], batches[1], torch.float32)
        return product.reshape(*left.shape[:-1], right.shape[-1])

    def quantize(self, x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
        groups = x.reshape(*x.shape[:-1], -1, group_size).to(self.accumulate_dtype(x))
        largest, smallest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
        top = 2**bits - 1
        # CUDA multiplies by the inverse of a Python number; a tensor it divides by
        scales = ((largest - smallest) / groups.new_full((), top)).clamp_min(1e-7)
        # like MLX: the end of the range that is farther from zero is represented exactly
        is_negative = smallest.abs() > largest.abs()
        scales = torch.where(is_negative, scales, -scales)
        edges = torch.where(is_negative, smallest, largest)
        steps = (edges / scales).round()
        scales = torch.where(steps != 0, edges / torch.where(steps == 0, 1, steps), scales)
        biases = torch.where(steps != 0, edges, 0)
        codes = ((groups - biases) / scales).round().clamp(0, top).to(torch.int64)
        words = bit_packing.pack(codes.flatten(-2), bits)
        return words, scales[..., 0].to(x.dtype), biases[..., 0].to(x.dtype)

    def dequantize(self, packed: tuple[Array, ...], group_size: int, bits: int) -> Array:
        words, scales, biases = packed
        codes = bit_packing.unpack(words, bits).to(scales.dtype)
        groups = codes.reshape(*scales.shape, group_size)
        return (groups * scales[..., None] + biases[..., None]).flatten(-2)

    def logsumexp(self, x: Array) -> Array:
        return torch.logsumexp(x, dim=-1)

    def put_along(self, x: Array, at: Array, values: Array) -> Array:
        at = at.long() if x.ndim == at.ndim else at.long()[..., None].expand_as(values)
        values = values.to(x.dtype).expand_as(at)
        return x.scatter(2, at, values)

    def add_product(self, x: Array, left: Array, right: Array) -> Array:
        if len(right) == len(left):
            return torch.baddbmm(*(y.flatten(0, 1) for y in (x, left, right))).view(x.shape)
        # a matrix that sequences share is read once, and not copied for each
        shared, (batch, heads, n, _) = right[0], x.shape
        x, left = (y.transpose(0, 1).reshape(heads, batch * n, -1) for y in (x, left))
        product = torch.baddbmm(x, left, shared)
        return product.view(heads, batch, n, -1).transpose(0, 1)

    def step_dtype(self, dtype: Any) -> Any:
        # the CPU multiplies 16-bit matrices slowly
        is_short = dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if self.device.type == "cpu" and is_short else dtype

    def active_memory(self) -> int:
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        # PyTorch keeps no count for the CPU: add up the storages of the tensors that are alive
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # the CPU's only peak is the process's, which no reset lowers
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def attend_dense(
        self, queries: Array, dense: Dense, sinks: Array | None
    ) -> tuple[Array, Array]:
        return self.kernels.run(
            "attend_dense",
            triton_kernels.ATTEND_DENSE,
            super().attend_dense,
            *(queries, dense, sinks),
        )

    def choose_rows(self, worth: Array, count: int) -> Array:
        return self.kernels.run(
            "choose_rows", triton_kernels.CHOOSE_ROWS, super().choose_rows, worth, count
        )

    def key_scores(self, stored: Stored, rows: Array, queries: Array) -> Array:
        return self.kernels.run(
            "key_scores", triton_kernels.KEY_SCORES, super().key_scores, stored, rows, queries
        )

    def weigh_rows(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        return self.kernels.run(
            "weigh_rows",
            triton_kernels.WEIGH_ROWS,
            super().weigh_rows,
            *(latent, rows, scores, totals, beside),
        )

    def query_terms(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        return self.kernels.run(
            "query_terms",
            triton_kernels.QUERY_TERMS,
            super().query_terms,
            *(queries, basis, spec),
        )

    def index_scores(
        self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int
    ) -> Array:
        return self.kernels.run(
            "index_scores",
            triton_kernels.INDEX_SCORES,
            super().index_scores,
            *(absorbed, latent, offsets, n_kv_heads),
        )
