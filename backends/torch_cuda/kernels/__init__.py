"""Triton kernels of the fused operations, imported only when one is about to run."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache, cached_property
from typing import Any, Protocol

import torch

from xkv.ops.backend import Backend
from xkv.ops.kernels import Kernel
from xkv.ops.types import Array

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_no_kernels(device: torch.device) -> str | None:
    """A sentence that says why no Triton kernel runs on a device, or None."""
    if device.type != "cuda" and not is_interpreted():
        return f"Triton kernels need a CUDA device, and this backend computes on {device}"
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton kernels need compute capability 8.0, which {device} does not have"
    return None


class DeviceKernel(Kernel, Protocol):
    """What a kernel's module holds."""

    def leading(self, *args: Any) -> Array:
        """The argument in whose dtype the kernel multiplies, and on whose device."""


class TritonKernel:
    """One kernel by its module's name; the module imports Triton, and so is loaded at first use."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def _kernel(self) -> DeviceKernel:
        return importlib.import_module(f"{__name__}.{self.name}").KERNEL

    def why_not(self, *args: Any) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        leading = self._kernel.leading(*args)
        device = leading.device
        reason = why_no_kernels(device)
        if reason is not None:
            return reason
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            return f"Triton launches on cuda:{torch.cuda.current_device()}, not on {device}"
        if leading.dtype not in KERNEL_DTYPES:
            return f"Triton kernels take 16- and 32-bit floats, not {leading.dtype}"
        return self._kernel.why_not(*args)

    def sample(self, backend: Backend, *args: Any) -> tuple[Any, ...]:
        """A small input of the same kind as ``args``, for the first-use check."""
        return self._kernel.sample(backend, *args)

    def check_key(self, *args: Any) -> tuple[Any, ...]:
        """What makes a new compilation."""
        return self._kernel.check_key(*args)

    def __call__(self, *args: Any) -> Any:
        """Launch.

        Raises:
            RuntimeError: If Triton cannot compile or launch the kernel.
        """
        from triton import TritonError

        try:
            return self._kernel(*args)
        except TritonError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


ATTEND_DENSE = TritonKernel("attend_dense")
CHOOSE_ROWS = TritonKernel("choose_rows")
KEY_SCORES = TritonKernel("key_scores")
QUERY_TERMS = TritonKernel("query_terms")
INDEX_SCORES = TritonKernel("index_scores")
WEIGH_ROWS = TritonKernel("weigh_rows")
