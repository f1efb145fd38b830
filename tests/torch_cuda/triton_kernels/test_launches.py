"""What a decode step launches on CUDA, counted where Triton's interpreter stands in for a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.torch_cuda.triton_kernels.checks import needs_triton
from xkv import XKVConfig
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_step import DecodeStep, StepShape
from xkv.ops.backend import Backend
from xkv.ops.working_set import attend_set
from xkv.planning import decode_cost
from xkv.planning.chips import MODELS
from xkv.store.shapes import GroupShape

pytestmark = needs_triton

NO_LAUNCH = {
    *("view", "_unsafe_view", "permute", "transpose", "slice", "select", "unsqueeze", "expand"),
    *("empty", "alias", "detach", "as_strided", "split_with_sizes", "promote_types"),
    # of what these tests poison
    "fill_",
}
"""Operations that compute nothing."""


class Launches(TorchDispatchMode):
    """Names of the operations that ran, and of Triton's kernels, whose own are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_inside_kernel = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function._schema.name.removeprefix("aten::")
        if not self.is_inside_kernel and name not in NO_LAUNCH:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def counted(launches: Launches, run: Any) -> Any:
    """A kernel's launch, counted once."""

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        launches.names.append(self.fn.__name__)
        launches.is_inside_kernel = True
        try:
            return run(self, *args, **options)
        finally:
            launches.is_inside_kernel = False

    return launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
def test_launches_by_formula_are_those_of_a_step(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(MODELS["Llama-3.1-8B"], group=GroupShape(4, 2, 64, 64), n_heads=8)
    step = DecodeStep(backend, StepShape(model, dtype="bfloat16"), 1500)
    monkeypatch.setattr(backend, "step_dtype", lambda dtype: dtype)
    inputs = step.wide_queries(), step.segment(step.n_recent), step.dense
    # tables of angles, and of bands, are kept from the step before
    attend_set(backend, *inputs, step.scale, step.n_rebuilt)
    launches = Launches()
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    monkeypatch.setattr(executor, "__call__", counted(launches, executor.__call__))
    with launches:
        attend_set(backend, *inputs, step.scale, step.n_rebuilt)
    parts = decode_cost.working_set(step.layer, XKVConfig(compression=8), 1500, is_metal=False)
    # without writing the new token's rows
    assert len(launches.names) == decode_cost.total(parts).launches - 2, launches.names


def test_formulas_know_the_kernels_sizes() -> None:
    def module(name: str) -> Any:
        return importlib.import_module(f"{triton_kernels.__name__}.{name}")

    assert module("attend_dense").PART == decode_cost.CUDA_DENSE_ROWS
    choose = module("choose_rows")
    assert (choose.RUNS, choose.RUN) == (decode_cost.CUDA_RUNS, decode_cost.CUDA_RUN)
    # Llama-3.1-8B's 8 KV heads and 128 rows
    keys = module("key_scores")
    assert keys.PROGRAMS // (128 // keys.BLOCK_ROWS * 8) == decode_cost.CUDA_KEY_PARTS
