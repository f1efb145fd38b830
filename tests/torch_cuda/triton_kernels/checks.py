"""Inputs of the kernels, and the float64 reference beside them."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import CHUNK_SIZE, DecodeInputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.selection import make_landmarks
from xkv.ops.types import Landmarks

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton (Linux)")
OPERATIONS = ["reconstruct_rows", "selected_attention", "lowrank_attention"]


def arguments(operation: str, inputs: DecodeInputs, chunk_size: int = CHUNK_SIZE) -> tuple:
    """The inputs in the order of the backend's method."""
    x = inputs
    if operation == "reconstruct_rows":
        ids = torch.arange(chunk_size, device=x.chunks.device)
        return x.segment, (x.chunks[..., None] * chunk_size + ids).flatten(-2)
    if operation == "selected_attention":
        return x.queries, x.segment, x.chunks, chunk_size, x.keys, x.values, x.scale
    return x.queries, x.segment, x.keys, x.values, x.scale


def exact(args: Any, reference: Backend) -> Any:
    """The same numbers in float64 on the reference's device."""
    if isinstance(args, torch.Tensor):
        args = args.to(reference.device)
        return args.double() if args.is_floating_point() else args
    if isinstance(args, tuple):
        numbers = [exact(x, reference) for x in args]
        return type(args)(*numbers) if hasattr(args, "_fields") else tuple(numbers)
    return args


def check(backend: Backend, reference: Backend, operation: str, args: tuple) -> None:
    """Run the kernel, and compare with the reference on the same numbers."""
    backend.kernels.last_path.clear()
    got = getattr(backend, operation)(*args)
    assert backend.kernels.last_path[operation] == operation
    dtype = str(got.dtype).removeprefix("torch.")
    want = getattr(reference, operation)(*exact(args, reference))
    assert got.dtype == (args[0].latent_k if operation == "reconstruct_rows" else args[0]).dtype
    error = relative_error(backend.to_numpy(got), reference.to_numpy(want))
    assert error <= TOLERANCE[dtype], f"{operation} in {dtype} is off by {error:.2e}"


def make_scores_case(
    backend: Backend, dtype: str, n_chunks: int, head_dim: int = 64, bits: int = 8, sharing: int = 4
) -> tuple[torch.Tensor, Landmarks, float]:
    """Queries and landmarks of two KV heads and a batch of two; outliers in both."""
    kind = getattr(torch, dtype)
    queries = (backend.normal((2, 2 * sharing, 1, head_dim), 1) * 3).to(kind)
    keys = backend.normal((2, 2, 2 * n_chunks, head_dim), 2).to(kind)
    landmarks, _ = make_landmarks(backend, keys, 2, n_chunks // 20, bits)
    return queries, landmarks, head_dim**-0.5


def scores_error(got: torch.Tensor, args: tuple, reference: Backend) -> float:
    """Relative error apart from the outliers, which are marked exactly."""
    want = reference.chunk_scores(*exact(args, reference))
    is_outlier = args[1].is_outlier.cpu().numpy()
    scores, expected = got.cpu().numpy(), reference.to_numpy(want)
    assert got.dtype == torch.float32
    assert ((scores == -1) == is_outlier).all()
    return relative_error(scores[~is_outlier], expected[~is_outlier])


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
