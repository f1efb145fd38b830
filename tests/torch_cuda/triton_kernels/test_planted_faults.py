"""Kernels with a fault, which the tests must see."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import xkv
from tests.torch_cuda.triton_kernels.checks import arguments, kernel_error, load_copy, needs_triton
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
)
"""Straddling words, three blocks, two tiles of queries and of rows."""

FAULTS = [
    ("rebuild_rows", "position + ids", "position + ids + 1"),
    ("rebuild_rows", "head * basis_head", "0 * basis_head"),
    ("rebuild_rows", "batch * basis_batch", "0 * basis_batch"),
    ("rebuild_rows", "batch * numbers_batch", "0 * numbers_batch"),
    ("rebuild_rows", "batch * scales_batch", "0 * scales_batch"),
    ("rebuild_rows", "wanted < n_rows", "wanted < n_rows - 1"),
    ("rebuild_rows", "is_turned, rope_scale, 1.0", "is_turned, 1.0, 1.0"),
    ("rebuild_rows", "n_pairs, HEAD_DIM // 2)\n", "HEAD_DIM // 2, HEAD_DIM // 2)\n"),
    ("rebuild_rows", "start // BAND_WIDTH,", "0,"),
    ("rebuild_rows", "start % BAND_WIDTH + columns,", "columns,"),
    ("common of rebuild_rows", "codes | rest <<", "codes | 0 * rest <<"),
    ("common of rebuild_rows", "first_bits % 32)", "first_bits % 16)"),
    ("common of rebuild_rows", "first_word +", "0 * first_word +"),
    ("common of rebuild_rows", "scale[:, None] + bias[:, None]", "scale[:, None]"),
    ("weigh_rows", "wanted < n_rows", "wanted < n_rows - 1"),
    ("weigh_rows", "range(0, n_rows, N)", "range(0, N, N)"),
    ("weigh_rows", "sums < n_sums", "sums < n_sums - 1"),
    ("weigh_rows", "* N_SUMS + tl", "* 0 + tl"),
    ("weigh_rows", "head_of_batch * n_rows", "head * n_rows"),
    ("weigh_rows", "head_of_batch * n_rows", "0 * n_rows"),
    ("weigh_rows", "head * weights_head", "0 * weights_head"),
    ("weigh_rows", "batch * weights_batch", "0 * weights_batch"),
    ("weigh_rows", "[:, None] * weights_sum", "[:, None] * n_rows"),
    ("weigh_rows", "batch * numbers_batch", "0 * numbers_batch"),
    ("weigh_rows", "batch * scales_batch", "0 * scales_batch"),
    ("weigh_rows", "band,\n                columns,", "0,\n                columns,"),
    ("weigh_rows", "tile.to(dtype), total,", "tile.to(dtype), 0 * total,"),
    ("common of weigh_rows", "codes | rest <<", "codes | 0 * rest <<"),
    ("common of weigh_rows", "first_word +", "0 * first_word +"),
    ("common of weigh_rows", "scale[:, None] + bias[:, None]", "scale[:, None]"),
    ("index_scores", "rows < n_rows", "rows < n_rows - 1"),
    ("index_scores", "block * absorbed_block", "block // 2 * absorbed_block"),
    ("index_scores", "block * absorbed_block", "0 * absorbed_block"),
    ("index_scores", "batch * absorbed_batch", "0 * absorbed_batch"),
    ("index_scores", "batch * numbers_batch", "0 * numbers_batch"),
    ("index_scores", "batch * scales_batch", "0 * scales_batch"),
    ("index_scores", "offsets + batch * n_all", "offsets"),
    ("index_scores", "head * n_sharing + sharing", "sharing"),
    ("index_scores", "tl.maximum(best, ", "tl.maximum(tl.min(best), "),
    ("index_scores", "range(0, n_sharing, N_QUERIES)", "range(0, N_QUERIES, N_QUERIES)"),
    ("index_scores", "range(1, rank", "range(2, rank"),
    ("index_scores", "* 0.5\n", "* 0.25\n"),
    ("index_scores", "+ bias) * 8.0", "+ bias)"),
    ("common of index_scores", "codes | rest <<", "codes | 0 * rest <<"),
]


def error_of(kernel: Any, backend: Backend, reference: Backend, operation: str) -> float:
    """Error over the tolerance."""
    inputs = make_inputs(backend, CASE, "float32")
    args = arguments(backend, operation, inputs)
    if operation == "index_scores":
        # the first block is to differ from the last
        args = args[0] * torch.linspace(1, 3, 3, device=args[0].device)[:, None, None], *args[1:]
    error = kernel_error(kernel, backend, reference, operation, args)
    return error / TOLERANCE["float32"]


@pytest.mark.parametrize("operation", ["rebuild_rows keys", "weigh_rows", "index_scores"])
def test_fault_table_starts_from_right_kernels(
    backend: Backend,
    reference: Backend,
    operation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = operation.split()[0]
    kernel = load_copy(tmp_path, f"right_{name}").TritonKernel(name)
    assert error_of(kernel, backend, reference, operation) <= 1


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
    operation = "rebuild_rows keys" if name == "rebuild_rows" else name
    assert error_of(kernel, backend, reference, operation) > 10


def test_auto_replaces_wrong_kernel(
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, "wrong", "position + ids", "position - ids", "rebuild_rows")
    monkeypatch.setattr(triton_kernels, "REBUILD_ROWS", copy.REBUILD_ROWS)
    auto = xkv.load_backend("torch", device=str(backend.device), kernels="auto")
    args = arguments(backend, "rebuild_rows keys", make_inputs(backend, CASES[0], "float32"))
    for _ in range(2):
        auto.rebuild_rows(*args)
    assert auto.kernels.last_path["rebuild_rows"] == "plain"
    told = [x for x in caplog.records if "disagrees" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.WARNING]
