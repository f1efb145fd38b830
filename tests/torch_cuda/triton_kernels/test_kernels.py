"""The Triton kernels against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import xkv
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    check,
    exact,
    make_scores_case,
    needs_triton,
)
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, DecodeInputs, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.types import RopeRun

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_matches_reference(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase, dtype: str
) -> None:
    inputs = make_inputs(backend, case, dtype)
    check(backend, reference, operation, arguments(operation, inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_use_check_passes(backend: Backend, dtype: str) -> None:
    checked = xkv.load_backend("torch", device=str(backend.device), kernels="on")
    inputs = make_inputs(checked, CASES[3], dtype)
    for operation in OPERATIONS:
        getattr(checked, operation)(*arguments(operation, inputs))
    checked.chunk_scores(*make_scores_case(checked, dtype, 20))
    assert checked.kernels.last_path == {name: name for name in [*OPERATIONS, "chunk_scores"]}


@pytest.mark.parametrize("n", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_at_tile_edges(backend: Backend, reference: Backend, operation: str, n: int) -> None:
    n_rows = n if operation == "lowrank_attention" else 3 * n
    case = DecodeCase(8 * n_rows, 3, 1, 64, 32, n, n_dense=n, n_selected_chunks=n)
    inputs = make_inputs(backend, case, "float32")
    latents = [x[:, :n_rows] for x in inputs.segment[:2]]
    runs = (RopeRun(n_rows, inputs.segment.rope_runs[0].spec),)
    segment = inputs.segment._replace(latent_k=latents[0], latent_v=latents[1], rope_runs=runs)
    # chunks of one row, so that the number of selected rows is any number
    inputs = make_like(inputs, segment=segment, chunks=inputs.chunks % n_rows)
    check(backend, reference, operation, arguments(operation, inputs, chunk_size=1))


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 65])
def test_kernel_at_rank_edges(backend: Backend, reference: Backend, rank: int) -> None:
    inputs = make_inputs(backend, DecodeCase(24, 2, 1, 64, rank, 66 - rank), "float32")
    check(backend, reference, "selected_attention", arguments("selected_attention", inputs, 3))


def make_like(inputs: DecodeInputs, **changes: Any) -> DecodeInputs:
    return DecodeInputs(**{**vars(inputs), **changes})


def unrotated(inputs: DecodeInputs) -> DecodeInputs:
    """Without rotation, whose float32 angles are 1e-5 off at 2000 rows in the plain twin too."""
    runs = (RopeRun(inputs.segment.rope_runs[0].n_rows, None),)
    return make_like(inputs, segment=inputs.segment._replace(rope_runs=runs))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_without_rope(backend: Backend, reference: Backend, operation: str) -> None:
    inputs = unrotated(make_inputs(backend, CASES[1], "float32"))
    check(backend, reference, operation, arguments(operation, inputs))


@pytest.mark.parametrize("max_splits", [3, 64])
def test_lowrank_attention_over_many_blocks(
    backend: Backend, reference: Backend, max_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 12 blocks a split, and more splits than the merge takes at a time
    kernel = triton_kernels.LOWRANK_ATTENTION._kernel
    monkeypatch.setattr(sys.modules[kernel.__module__], "MAX_SPLITS", max_splits)
    inputs = unrotated(make_inputs(backend, DecodeCase(34 * 64 + 1, 2, 1, 32, 16, 16), "float32"))
    check(backend, reference, "lowrank_attention", arguments("lowrank_attention", inputs))


def test_selected_attention_over_many_blocks(backend: Backend, reference: Backend) -> None:
    case = DecodeCase(34 * 64, 2, 1, 32, 16, 16, n_dense=33 * 64, n_selected_chunks=33 * 8)
    inputs = unrotated(make_inputs(backend, case, "float32"))
    check(backend, reference, "selected_attention", arguments("selected_attention", inputs))


@pytest.mark.parametrize("operation", ["selected_attention", "lowrank_attention"])
@pytest.mark.parametrize("n_used", [1, 64, 70, 130])
def test_kernel_reads_the_rows_in_use(
    backend: Backend, reference: Backend, operation: str, n_used: int
) -> None:
    """Of 130 dense rows, three blocks: some of these are in use in part or not at all."""
    inputs = make_inputs(backend, CASES[4], "float32")
    counted = torch.tensor([n_used], device=backend.device)
    segment = inputs.segment._replace(n_dense=counted)
    unused = torch.arange(130, device=backend.device)[:, None] >= n_used
    keys, values = (torch.where(unused, 1e3, x) for x in (inputs.keys, inputs.values))
    args = arguments(operation, make_like(inputs, segment=segment, keys=keys, values=values))
    check(backend, reference, operation, args)
    plain = arguments(operation, make_like(inputs, keys=keys, values=values))
    cut = tuple(x[..., :n_used, :] if x is keys or x is values else x for x in plain)
    got, want = getattr(backend, operation)(*args), getattr(backend, operation)(*cut)
    assert relative_error(backend.to_numpy(got), backend.to_numpy(want)) < 1e-5


@pytest.mark.parametrize("start", [100_000, 1_000_000])
def test_reconstruct_rows_far_positions(backend: Backend, start: int) -> None:
    # float32 angles are coarse out here, and are part of the definition: the cosines are not
    inputs = make_inputs(backend, CASES[0], "float32")
    segment, rows = arguments("reconstruct_rows", inputs)
    got = backend.to_numpy(backend.reconstruct_rows(segment._replace(start=start), rows))
    half, ids = CASES[0].head_dim // 2, backend.to_numpy(rows)[0]
    inverse = np.float32(1) / np.array(segment.rope_runs[0].spec.freqs, np.float32)
    angles = (np.float32(start + ids)[..., None] * inverse).astype(np.float64)
    latent, basis = (backend.to_numpy(x)[0].astype(np.float64) for x in segment[0:3:2])
    keys = np.einsum("hsr,rhd->hsd", latent[ids], basis)
    x, y = keys[..., :half], keys[..., half:]
    turned = [x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)]
    assert relative_error(got[0], np.concatenate(turned, axis=-1)) <= 1e-6


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_reads_no_other_rows(backend: Backend, reference: Backend, operation: str) -> None:
    case = CASES[4]
    inputs = make_inputs(backend, case, "float16")
    want = getattr(reference, operation)(*exact(arguments(operation, inputs), reference))

    def in_buffer(x: torch.Tensor, axis: int) -> torch.Tensor:
        """The same numbers in an array that is longer and wider, and NaN elsewhere."""
        shape = [n + 40 * (i in (axis, x.ndim - 1)) for i, n in enumerate(x.shape)]
        buffer = x.new_full(shape, torch.nan)
        buffer = buffer[tuple(slice(n) for n in x.shape)]
        buffer.copy_(x)
        return buffer

    latents = [in_buffer(x, 1) for x in inputs.segment[:2]]
    if operation != "lowrank_attention":
        is_selected = torch.zeros(case.batch, case.n_rows, dtype=torch.bool)
        rows = arguments("reconstruct_rows", inputs)[1].cpu().flatten(1)
        is_selected.scatter_(1, rows, True)
        assert not is_selected.all()
        for latent in latents[: 1 if operation == "reconstruct_rows" else 2]:
            latent[~is_selected.to(latent.device)] = torch.nan
    bases = [in_buffer(x, 1) for x in inputs.segment[2:4]]
    segment = inputs.segment._replace(
        latent_k=latents[0], latent_v=latents[1], basis_k=bases[0], basis_v=bases[1]
    )
    poisoned = make_like(
        inputs,
        segment=segment,
        keys=in_buffer(inputs.keys, 2),
        values=in_buffer(inputs.values, 2),
    )
    got = getattr(backend, operation)(*arguments(operation, poisoned))
    error = relative_error(backend.to_numpy(got), reference.to_numpy(want))
    assert error <= TOLERANCE["float16"]
