"""Kernels with a fault, which the tests must see."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xkv
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    exact,
    load_copy,
    make_scores_case,
    needs_triton,
    scores_error,
)
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import CASES, CHUNK_SIZE, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend

pytestmark = needs_triton


FAULTS = [
    ("reconstruct_rows", "reconstruct_rows", "position + ids", "position + ids + 1"),
    ("reconstruct_rows", "reconstruct_rows", "head * basis_head", "0 * basis_head"),
    ("reconstruct_rows", "reconstruct_rows", "selected < n_rows", "selected < n_rows - 1"),
    ("reconstruct_rows", "common", "is_turned, rope_scale, 1.0", "is_turned, 1.0, 1.0"),
    ("selected_attention", "selected_attention", "position + rows", "position + rows + 1"),
    ("selected_attention", "selected_attention", "head * basis_head", "0 * basis_head"),
    (
        "selected_attention",
        "selected_attention",
        "n_chunks * CHUNK_SIZE\n",
        "n_chunks * CHUNK_SIZE - 1\n",
    ),
    ("selected_attention", "common", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    ("selected_attention", "common", "else n_dense)", "else n_dense - 1)"),
    ("selected_attention", "common", "(head // SHARING) * basis_head", "0 * basis_head"),
    ("lowrank_attention", "lowrank_attention", "position + rows", "position + rows + 1"),
    ("lowrank_attention", "lowrank_attention", "head * basis_head", "0 * basis_head"),
    ("lowrank_attention", "lowrank_attention", "rows < end", "rows < end - 1"),
    ("lowrank_attention", "lowrank_attention", "products * scale", "products"),
    ("lowrank_attention", "lowrank_attention", "part * shrunk[:, None]", "part"),
    ("chunk_scores", "chunk_scores", "product *= scale", "product *= 1.0"),
    ("chunk_scores", "chunk_scores", "rows = at * n_chunks + chunks", "rows = chunks"),
    ("chunk_scores", "chunk_scores", "bias[:, None] * query_sum[None, :]", "0.0"),
]


def kernel_error(kernel: Any, backend: Backend, reference: Backend, operation: str) -> float:
    """Error over the tolerance; infinite where something was left unwritten."""
    if operation == "chunk_scores":
        args = make_scores_case(backend, "float16", 40)
        return scores_error(kernel(*args), args, reference) / TOLERANCE["float32"]
    case = DecodeCase(136, 8, 2, 64, 37, 50, n_dense=9, n_selected_chunks=9, rope_scale=1.2)
    inputs = make_inputs(backend, case, "float32")
    # rows that a fault may drop matter: the last of each kind of rows resembles the queries
    inputs.keys[..., -1, :] *= 3
    last = inputs.chunks[..., -1].flatten()[-1] * CHUNK_SIZE + CHUNK_SIZE - 1
    inputs.segment.latent_k[:, [int(last), -1]] *= 3
    if operation == "lowrank_attention":
        # several blocks a split, as in a long segment
        sys.modules[kernel._kernel.__module__].MAX_SPLITS = 2
    args = arguments(operation, inputs)
    want = reference.to_numpy(getattr(reference, operation)(*exact(args, reference)))
    got = backend.to_numpy(kernel(*args))
    return relative_error(got, want) / TOLERANCE["float32"] if np.isfinite(got).all() else np.inf


@pytest.mark.parametrize("operation", [*OPERATIONS, "chunk_scores"])
def test_fault_table_starts_from_right_kernels(
    backend: Backend,
    reference: Backend,
    operation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, f"right_{operation}")
    kernel = copy.TritonKernel(operation)
    assert kernel_error(kernel, backend, reference, operation) <= 1


@pytest.mark.parametrize(
    ("operation", "file", "old", "new"), FAULTS, ids=[f"{x[0]}-{x[3].strip()}" for x in FAULTS]
)
def test_planted_fault_exceeds_tolerance(
    backend: Backend,
    reference: Backend,
    operation: str,
    file: str,
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"faulty_{FAULTS.index((operation, file, old, new))}"
    kernel = load_copy(tmp_path, name, old, new, file).TritonKernel(operation)
    assert kernel_error(kernel, backend, reference, operation) > 10


def test_auto_replaces_wrong_kernel(
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, "wrong", "position + rows", "position - rows", "selected_attention")
    monkeypatch.setattr(triton_kernels, "SELECTED_ATTENTION", copy.SELECTED_ATTENTION)
    auto = xkv.load_backend("torch", device=str(backend.device), kernels="auto")
    args = arguments("selected_attention", make_inputs(auto, CASES[0], "float32"))
    for _ in range(2):
        auto.selected_attention(*args)
    assert auto.kernels.last_path["selected_attention"] == "plain"
    told = [x for x in caplog.records if "disagrees" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.WARNING]
