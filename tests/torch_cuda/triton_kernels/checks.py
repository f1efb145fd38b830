"""Inputs of the kernels, and the float64 reference beside them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import DecodeCase, DecodeInputs, hide_rows, make_inputs
from xkv.checks.operations import absorbed_of, offsets_of
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.index import index_basis
from xkv.ops.latent import Latent
from xkv.ops.scores import Dense

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton (Linux)")
OPERATIONS = [
    *("key_scores", "weigh_rows", "index_scores"),
    *("query_terms", "attend_dense", "choose_rows"),
]
WITHOUT_LATENT = ("query_terms", "attend_dense", "choose_rows")
WITHOUT_ROWS = ("index_scores", *WITHOUT_LATENT)
"""Those that take no numbers of a latent's rows."""
LARGE = 100.0
"""Its exponential is no float32."""


def arguments(backend: Backend, operation: str, x: DecodeInputs) -> tuple[Any, ...]:
    """The inputs in the order of the backend's method."""
    if operation == "index_scores":
        absorbed, latent = absorbed_of(backend, x), x.segment.keys.latent
        return absorbed, latent, offsets_of(backend, x), x.case.n_kv_heads
    if operation == "weigh_rows":
        return x.segment.values.latent, x.rows, *scored(backend, x)
    if operation == "query_terms":
        return x.queries * x.scale, index_basis(backend, x.segment.keys), x.case.spec
    if operation == "attend_dense":
        return x.queries * x.scale, x.dense, None
    if operation == "choose_rows":
        worth = (*x.rows.shape[:2], x.case.n_rows)
        return backend.normal(worth, 8), x.case.n_rebuilt
    return x.segment.keys, x.rows, x.queries * x.scale


def scored(backend: Backend, x: DecodeInputs) -> tuple[torch.Tensor, ...]:
    """Scores of a case's rows that make a peaked softmax, and others that take as much.

    They are far above zero for one query, far below for the next.
    """
    n_sums = x.case.n_heads // x.case.n_kv_heads * x.case.n_queries
    sides = LARGE * (-1) ** torch.arange(n_sums, device=x.rows.device)[:, None]
    scores = sides + 3 * backend.normal((*x.rows.shape[:2], n_sums, x.rows.shape[2]), 5)
    totals = scores.logsumexp(-1) + backend.normal(scores.shape[:3], 6)
    beside = backend.normal(x.queries.shape, 7).to(x.queries.dtype)
    return scores, totals.reshape(x.queries.shape[:3]), beside


def mapped(args: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """Arguments with each of their arrays, or latents, changed."""
    if isinstance(args, kind):
        return change(args)
    if isinstance(args, Latent):
        return args.map(change) if kind is torch.Tensor else args
    if isinstance(args, tuple):
        parts = [mapped(x, change, kind) for x in args]
        return type(args)(*parts) if hasattr(args, "_fields") else tuple(parts)
    return args


def trapped(backend: Backend, operation: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, NaN in the rows that nobody asks for and in those past the end."""
    has_rows = operation not in WITHOUT_ROWS
    if has_rows:
        # the first of an array's rows, as a step's are
        wide = torch.nn.functional.pad(args[1], (0, 3), value=0)
        args = args[0], wide[..., :-3], *args[2:]

    if operation == "attend_dense":
        queries, dense, sinks = args
        return queries, Dense(*map(spared, dense[:2]), None, dense.recent), sinks

    def hide(latent: Latent) -> Latent:
        is_used = np.full(latent.shape[:2], not has_rows)
        if has_rows:
            rows = backend.to_numpy(args[1]).reshape(len(is_used), -1)
            np.put_along_axis(is_used, rows.astype(np.int64), True, axis=1)
        return hide_rows(backend, latent, is_used)

    return mapped(args, hide, Latent)


def spared(rows: torch.Tensor) -> torch.Tensor:
    """A view of a buffer that goes on with NaN."""
    spare = torch.full_like(rows[..., :5, :], torch.nan)
    return torch.cat([rows, spare], dim=-2)[..., : rows.shape[-2], :]


def results(found: Any) -> tuple[torch.Tensor, ...]:
    """Those of an operation, of which some give one."""
    return found if isinstance(found, tuple) else (found,)


def dtypes_of(operation: str, args: Any) -> list[torch.dtype]:
    """What an operation's results are in."""
    if operation == "attend_dense":
        return [args[0].dtype, torch.float32]
    if operation == "weigh_rows":
        return [args[-1].dtype] * 2
    if operation == "query_terms":
        return [torch.promote_types(args[0].dtype, args[1].dtype)]
    if operation == "choose_rows":
        return [torch.int64]
    return [torch.float32]


def kernel_error(
    run: Callable[..., Any],
    backend: Backend,
    reference: Backend,
    operation: str,
    args: Any,
) -> float:
    """Relative error on trapped arguments, the largest of the results'; infinite if not finite."""
    got = results(run(*trapped(backend, operation, args)))
    assert [x.dtype for x in got] == dtypes_of(operation, args)

    def exact(x: torch.Tensor) -> torch.Tensor:
        x = x.to(reference.device)
        return x.double() if x.is_floating_point() else x

    want = results(getattr(reference, operation)(*mapped(args, exact)))
    if not all(x.isfinite().all() for x in got):
        return np.inf
    return max(
        relative_error(backend.to_numpy(x), reference.to_numpy(y))
        for x, y in zip(got, want, strict=True)
    )


def check(
    backend: Backend,
    reference: Backend,
    operation: str,
    case: DecodeCase,
    dtype: str,
    **changes: Any,
) -> None:
    """Run the kernel, and compare with the reference on the same numbers."""
    inputs = dataclasses.replace(make_inputs(backend, case, dtype), **changes)
    args = arguments(backend, operation, inputs)
    backend.kernels.last_path.clear()
    error = kernel_error(getattr(backend, operation), backend, reference, operation, args)
    assert backend.kernels.last_path == {operation: operation}
    assert error <= TOLERANCE[dtype], f"{operation} in {dtype} is off by {error:.2e}"


def load_copy(folder: Path, name: str, old: str = "", new: str = "", file: str = "") -> Any:
    """Import a copy of the kernels, one file of which is edited."""
    source = Path(triton_kernels.__file__).parent
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / name).glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            assert old in text, f"{file}.py has no {old!r}"
            text = text.replace(old, new)
        path.write_text(text.replace(triton_kernels.__name__, name))
    return importlib.import_module(name)
