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
from xkv.ops.latent import Latent

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton (Linux)")
OPERATIONS = ["rebuild_rows keys", "rebuild_rows values", "weigh_rows", "index_scores"]
"""A kernel's name, and of which rows."""


def arguments(backend: Backend, operation: str, x: DecodeInputs) -> tuple[Any, ...]:
    """The inputs in the order of the backend's method."""
    if operation == "index_scores":
        absorbed, latent = absorbed_of(backend, x), x.segment.keys.latent
        return absorbed, latent, offsets_of(backend, x), x.case.n_kv_heads
    if operation == "weigh_rows":
        return x.segment.values.latent, x.rows, weights_of(backend, x)
    return getattr(x.segment, operation.split()[1]), x.rows


def weights_of(backend: Backend, x: DecodeInputs) -> torch.Tensor:
    """A peaked softmax over a case's rows, for each query of a KV head."""
    n_sums = x.case.n_heads // x.case.n_kv_heads * x.case.n_queries
    scores = 3 * backend.normal((*x.rows.shape[:2], n_sums, x.rows.shape[2]), 5)
    return scores.softmax(-1).to(x.queries.dtype)


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
    if operation == "weigh_rows":
        # like those of a softmax that goes on over other rows
        wide = torch.nn.functional.pad(args[2], (0, 3, 0, 1), value=torch.nan)
        args = *args[:2], wide[:, :, :-1, :-3]

    def hide(latent: Latent) -> Latent:
        is_used = np.full(latent.shape[:2], operation == "index_scores")
        if operation != "index_scores":
            rows = backend.to_numpy(args[1]).reshape(len(is_used), -1)
            np.put_along_axis(is_used, rows.astype(np.int64), True, axis=1)
        return hide_rows(backend, latent, is_used)

    return mapped(args, hide, Latent)


def kernel_error(
    run: Callable[..., torch.Tensor],
    backend: Backend,
    reference: Backend,
    operation: str,
    args: Any,
) -> float:
    """Relative error on trapped arguments; infinite where something is not finite."""
    got = run(*trapped(backend, operation, args))
    dtypes = {"index_scores": torch.float32, "weigh_rows": getattr(args[-1], "dtype", None)}
    assert got.dtype == (dtypes[operation] if operation in dtypes else args[0].basis.dtype)

    def exact(x: torch.Tensor) -> torch.Tensor:
        x = x.to(reference.device)
        return x.double() if x.is_floating_point() else x

    want = getattr(reference, operation.split()[0])(*mapped(args, exact))
    if not got.isfinite().all():
        return np.inf
    return relative_error(backend.to_numpy(got), reference.to_numpy(want))


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
    args, name = arguments(backend, operation, inputs), operation.split()[0]
    backend.kernels.last_path.clear()
    error = kernel_error(getattr(backend, name), backend, reference, operation, args)
    assert backend.kernels.last_path == {name: name}
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
