"""Kernels with a fault, which the tests must see."""

from __future__ import annotations

import dataclasses
import logging
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

FAULTS = [
    ("key_scores", "position + ids", "position + ids + 1"),
    ("key_scores", "+ head * rows_head", "+ 0 * rows_head"),
    ("key_scores", "batch * rows_batch", "0 * rows_batch"),
    ("key_scores", "head * basis_head", "0 * basis_head"),
    ("key_scores", "batch * basis_batch", "0 * basis_batch"),
    ("key_scores", "batch * numbers_batch", "0 * numbers_batch"),
    ("key_scores", "batch * scales_batch", "0 * scales_batch"),
    ("key_scores", "wanted < n_rows", "wanted < n_rows - 1"),
    ("key_scores", "is_turned, rope_scale, 1.0", "is_turned, 1.0, 1.0"),
    ("key_scores", "n_pairs, HEAD_DIM // 2)\n", "HEAD_DIM // 2, HEAD_DIM // 2)\n"),
    ("key_scores", "start // BAND_WIDTH,", "0,"),
    ("key_scores", "start % BAND_WIDTH + columns,", "columns,"),
    ("key_scores", "queries += head_of_batch *", "queries += head *"),
    ("key_scores", "scores += head_of_batch *", "scores += batch *"),
    (
        "key_scores",
        "range(0, n_queries, N_QUERIES)",
        "range(0, N_QUERIES, N_QUERIES)",
    ),
    ("key_scores", "query < n_queries", "query < n_queries - 1"),
    ("key_scores", "start + tl.arange(0, N_QUERIES)", "tl.arange(0, N_QUERIES)"),
    ("key_scores", "q_y, found,", "q_y, 0 * found,"),
    ("key_scores", "tl.load(q + second[:, None]", "tl.load(q + first[:, None]"),
    ("key_scores", "dot(keys_y,", "dot(keys_x,"),
    ("key_scores", "* n_rows + wanted[:, None]", "* n_queries + wanted[:, None]"),
    ("common of key_scores", "codes | rest <<", "codes | 0 * rest <<"),
    ("common of key_scores", "first_bits % 32)", "first_bits % 16)"),
    ("common of key_scores", "first_word +", "0 * first_word +"),
    ("common of key_scores", "scale[:, None] + bias[:, None]", "scale[:, None]"),
    ("weigh_rows", "wanted < n_rows", "wanted < n_rows - 1"),
    ("weigh_rows", "range(0, n_rows, N)", "range(0, N, N)"),
    ("weigh_rows", "sums < n_sums", "sums < n_sums - 1"),
    ("weigh_rows", "* N_SUMS + tl", "* 0 + tl"),
    ("weigh_rows", "+ head * rows_head", "+ 0 * rows_head"),
    ("weigh_rows", "batch * rows_batch", "0 * rows_batch"),
    ("weigh_rows", "head_of_batch * n_sums", "head * n_sums"),
    ("weigh_rows", "head_of_batch * n_sums", "batch * n_sums"),
    ("weigh_rows", "places[:, None] * n_rows", "sums[:, None] * n_rows"),
    ("weigh_rows", "batch * numbers_batch", "0 * numbers_batch"),
    ("weigh_rows", "batch * scales_batch", "0 * scales_batch"),
    ("weigh_rows", "band,\n                columns,", "0,\n                columns,"),
    ("weigh_rows", "tile.to(dtype), total,", "tile.to(dtype), 0 * total,"),
    ("weigh_rows", 'score, float("-inf")', "score, 0.0"),
    ("weigh_rows", "tl.maximum(best, tl.max(score, axis=1))", "tl.max(score, axis=1)"),
    ("weigh_rows", "tl.exp(score - highest[:, None])", "tl.exp(score)"),
    ("weigh_rows", "fade = tl.exp(best - highest)", "fade = tl.exp(best - best)"),
    ("weigh_rows", "given * fade", "given"),
    ("weigh_rows", "total * fade[:, None]", "total"),
    ("weigh_rows", "best = highest", "best = best"),
    ("weigh_rows", "tl.load(totals + places", "tl.load(totals + sums"),
    ("weigh_rows", "tl.exp(best - highest), tl", "tl.exp(highest - highest), tl"),
    ("weigh_rows", "tl.exp(to_others - highest)", "0.0 * tl.exp(to_others - highest)"),
    ("weigh_rows", "given * on_rows + on_others", "given + on_others"),
    ("weigh_rows", "(on_rows / whole)", "(1.0 / whole)"),
    ("weigh_rows", "on_others / whole", "on_rows / whole"),
    ("weigh_rows", "(left * part[:, None])", "left"),
    ("weigh_rows", "if band == 0", "if band == 3"),
    ("weigh_rows", "at_rest = places", "at_rest = sums"),
    ("weigh_rows", "range(0, value_dim, BAND_WIDTH)", "range(0, value_dim, 2 * BAND_WIDTH)"),
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
    ("query_terms", "batch * queries_batch", "0 * queries_batch"),
    ("query_terms", "batch * basis_batch", "0 * basis_batch"),
    ("query_terms", "batch * output_batch", "0 * output_batch"),
    ("query_terms", "columns % n_queries", "columns % n_sharing"),
    ("query_terms", "columns // n_queries * basis_row", "0 * basis_row"),
    ("query_terms", "query // n_sharing * basis_head", "query // n_queries * basis_head"),
    ("query_terms", "columns < n_columns", "columns < n_columns - 1"),
    ("query_terms", "pair < n_pairs", "pair < n_pairs - 1"),
    (
        "query_terms",
        "first, second = pair, pair + n_pairs",
        "first, second = 2 * pair, 2 * pair + 1",
    ),
    ("query_terms", "pair, pair + n_pairs", "pair, pair + head_dim // 2"),
    ("query_terms", "q_1 * b_1 + q_2", "q_1 * b_1 - q_2"),
    ("query_terms", "q_2 * b_1 - q_1", "q_1 * b_2 - q_2"),
    ("query_terms", "q_1 * b_2) * rope_scale", "q_1 * b_2)"),
    ("query_terms", "q_2 * b_2) * rope_scale", "q_2 * b_2)"),
    ("query_terms", "(n_pairs + pair)", "(0 + pair)"),
    (
        "query_terms",
        "first, second = 2 * pair, 2 * pair + 1",
        "first, second = pair, pair + n_pairs",
    ),
    ("query_terms", "range(2 * n_pairs, head_dim", "range(n_pairs, head_dim"),
    ("query_terms", "feature < head_dim", "feature < head_dim - 1"),
    ("query_terms", "products += x", "products = x"),
    ("attend_dense", "start + tl.arange(0, N)", "tl.arange(0, N)"),
    ("attend_dense", "range(0, n_recent, N)", "range(0, N, N)"),
    ("attend_dense", "range(0, n_seen, N)", "range(0, N, N)"),
    ("attend_dense", "rows < n_recent", "rows < n_recent - 1"),
    ("attend_dense", "rows < n_seen", "rows < n_seen - 1"),
    ("attend_dense", "- n_queries + query + 1", "- n_queries + 1"),
    ("attend_dense", "- n_queries + query + 1", "- 0 * query"),
    ("attend_dense", "head // n_sharing", "head % 2"),
    ("attend_dense", "batch * keys_batch", "0 * keys_batch"),
    ("attend_dense", "kv_head * keys_head", "0 * keys_head"),
    ("attend_dense", "batch * values_batch", "0 * values_batch"),
    ("attend_dense", "kv_head * values_head", "0 * values_head"),
    ("attend_dense", "batch * numbers_batch", "0 * numbers_batch"),
    ("attend_dense", "kv_head * numbers_head", "0 * numbers_head"),
    ("attend_dense", "batch * scales_batch", "0 * scales_batch"),
    ("attend_dense", "kv_head * scales_head", "0 * scales_head"),
    ("attend_dense", "axis=1) * of_key", "axis=1)"),
    ("attend_dense", "scales_row + 1, mask", "scales_row, mask"),
    ("attend_dense", "at += HEAD_DIM", "at += 0"),
    ("attend_dense", 'score = tl.where(is_row, score, float("-inf"))', "score = score"),
    ("attend_dense", 'asked, axis=1), float("-inf"))', "asked, axis=1), 0.0)"),
    ("attend_dense", "total * fade", "total"),
    ("attend_dense", "sums * fade", "sums"),
    ("attend_dense", "tl.load(sinks + head)", "tl.load(sinks)"),
    ("attend_dense", "best * 0 + 1.0", "best * 0"),
    ("attend_dense", "(sums / total)", "sums"),
    ("attend_dense", "best + tl.log(total)", "tl.log(total)"),
    ("attend_dense", "(batch * n_heads + head)", "head"),
    ("attend_dense", "* n_queries + query\n", "* n_queries\n"),
    ("common of index_scores", "codes | rest <<", "codes | 0 * rest <<"),
]


def error_of(kernel: Any, backend: Backend, reference: Backend, operation: str) -> float:
    """Error over the tolerance."""
    cases = (
        [CASE, dataclasses.replace(CASE, traditional=True)]
        if operation == "query_terms"
        else [CASE]
    )
    errors = [error_of_case(kernel, backend, reference, operation, case) for case in cases]
    return max(errors) / TOLERANCE["float32"]


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
    assert error_of(kernel, backend, reference, name) > 10


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
