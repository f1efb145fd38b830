"""Triton kernels that must run: on the GPU, or interpreted."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import xkv
from tests.conftest import need_device
from tests.torch_cuda.triton_kernels.checks import HAS_TRITON
from xkv.ops.backend import Backend

if HAS_TRITON:
    import triton.language


def repair_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It multiplies bfloat16 as the integers that hold it, and cuts instead of rounding."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = triton.language
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter, "_convert_float", convert_float)


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Kernels that must run: on the GPU, or interpreted."""
    if torch.cuda.is_available():
        yield without_first_use_check("cuda")
        return
    if "cuda" in request.config.getoption("--require-backend"):
        need_device(request, "cuda", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        repair_interpreter(patch)
        yield without_first_use_check("cpu")


def without_first_use_check(device: str) -> Backend:
    """The check would take most of the time here; it has a test of its own."""
    backend = xkv.load_backend("torch", device=device, kernels="on")
    backend.kernels.check = lambda *args: None
    return backend


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        array = empty(*args, **options)
        # numbers of rows stay such that a kernel may read where they say
        return array.fill_(torch.nan if array.is_floating_point() else 0)

    monkeypatch.setattr(torch, "empty", poisoned)
