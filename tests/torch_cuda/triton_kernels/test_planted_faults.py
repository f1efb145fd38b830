"""Kernels with a fault, which the tests must see."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xkv
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    kernel_error,
    load_copy,
    needs_triton,
)
from tests.torch_cuda.triton_kernels.faults import FAULTS
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import CASES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE
from xkv.ops.backend import Backend

pytestmark = needs_triton

CASE = DecodeCase(
    *(600, 8, 2, 64),
    bits=(5, 4, 3),
    batch=2,
    rope_scale=1.2,
    rope_dims=32,
    n_rebuilt=65,
    n_queries=5,
    start=40,
    n_dense=40,
    n_recent=40,
)
"""Straddling words, three blocks, two tiles of queries and of rows, of dense and recent ones."""

OTHERWISE: dict[str, list[dict[str, Any]]] = {
    "query_terms": [{"traditional": True}],
    "index_scores": [
        {"n_heads": 64, "n_kv_heads": 16, "n_queries": 1},
        {"n_heads": 12, "n_kv_heads": 4},
    ],
    "attend_dense": [{"n_dense": 1100}],
}
"""What reaches the rest of a kernel: many KV heads, more parts than are put together at once."""


def errors_of(kernel: Any, backend: Backend, reference: Backend, operation: str) -> Iterator[float]:
    """Errors over the tolerance, of one case after the other."""
    for change in ({}, *OTHERWISE.get(operation, [])):
        case = dataclasses.replace(CASE, **change)
        error = error_of_case(kernel, backend, reference, operation, case)
        yield error / TOLERANCE["float32"]


def error_of_case(
    kernel: Any, backend: Backend, reference: Backend, operation: str, case: DecodeCase
) -> float:
    """On arguments in which faults show."""
    args = arguments(backend, operation, make_inputs(backend, case, "float32"))
    if operation == "attend_dense":
        args = *args[:2], backend.normal((case.n_heads,), 5) + 3
    if operation == "weigh_rows":
        # the second tile's row is far above the first's for some queries, far below for others
        args[2][:, :, 0::3, -1] += 12
        args[2][:, :, 1::3, -1] -= 200
        # more than one tile of columns
        args = *args[:4], torch.cat([args[4]] * 2, dim=-1)
    if operation == "choose_rows":
        # more rows than fit into runs of 8, all below zero in the second sequence
        worth = backend.normal((2, 2, 40_000), 8)
        worth[..., -1] = 9
        args = worth - torch.tensor([0.0, 20.0], device=worth.device)[:, None, None], 65
    if operation == "index_scores":
        # the first block is to differ from the last
        args = args[0] * torch.linspace(1, 3, 3, device=args[0].device)[:, None, None], *args[1:]
    return kernel_error(kernel, backend, reference, operation, args)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fault_table_starts_from_right_kernels(
    backend: Backend,
    reference: Backend,
    operation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    kernel = load_copy(tmp_path, f"right_{operation}").TritonKernel(operation)
    assert max(errors_of(kernel, backend, reference, operation)) <= 1


@pytest.mark.parametrize(
    "number", range(len(FAULTS)), ids=[f"{x[0]}-{x[2].strip()}" for x in FAULTS]
)
def test_planted_fault_exceeds_tolerance(
    backend: Backend,
    reference: Backend,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    where, old, new = FAULTS[number]
    file, name = where.split()[0], where.split()[-1]
    kernel = load_copy(tmp_path, f"faulty_{number}", old, new, file).TritonKernel(name)
    assert any(error > 10 for error in errors_of(kernel, backend, reference, name))


def test_auto_replaces_wrong_kernel(
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, "wrong", "position + ids", "position - ids", "key_scores")
    monkeypatch.setattr(triton_kernels, "KEY_SCORES", copy.KEY_SCORES)
    auto = xkv.load_backend("torch", device=str(backend.device), kernels="auto")
    args = arguments(backend, "key_scores", make_inputs(backend, CASES[0], "float32"))
    for _ in range(2):
        auto.key_scores(*args)
    assert auto.kernels.last_path["key_scores"] == "plain"
    told = [x for x in caplog.records if "disagrees" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.WARNING]
