"""The Triton kernels against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xkv
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    check,
    kernel_error,
    mapped,
    needs_triton,
)
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import RopeRun

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_matches_reference(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase, dtype: str
) -> None:
    check(backend, reference, operation, case, dtype)


EDGES = [
    *(
        DecodeCase(300, 2, 1, 64, 16, 16, n_rebuilt=n, n_kept=0)
        for n in (1, 31, 32, 33, 63, 64, 65, 129)
    ),
    *(DecodeCase(40, 2, 1, 64, rank, rank, n_kept=0) for rank in (1, 31, 33, 63, 64, 65)),
    *(DecodeCase(n, 2, 1, 64, 16, 16, n_rebuilt=1, n_kept=0) for n in (1, 63, 65, 255, 256, 257)),
    *(DecodeCase(70, 17 * n, n, 64, bits=(3,) * 18, n_kept=0, n_rebuilt=3) for n in (1, 3)),
    *(DecodeCase(70, 1, 1, 64, 16, 16, n_queries=n, n_kept=0) for n in (15, 16, 33)),
    DecodeCase(70, 4, 2, 32, 16, 16, rope_dims=16),
]
"""Around a kernel's tiles of rows, of columns, of blocks, of queries and of bands."""
EDGE_OPERATIONS = ["rebuild_rows keys", "weigh_rows", "index_scores"]


@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize("operation", EDGE_OPERATIONS)
def test_kernel_at_tile_edges(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase
) -> None:
    check(backend, reference, operation, case, "float32")


@pytest.mark.parametrize("operation", ["rebuild_rows keys", "index_scores"])
def test_kernel_without_rope(backend: Backend, reference: Backend, operation: str) -> None:
    inputs = make_inputs(backend, CASES[6], "float32")
    keys = inputs.segment.keys._replace(rope_runs=(RopeRun(CASES[6].n_rows, None),))
    segment = inputs.segment._replace(keys=keys)
    check(backend, reference, operation, CASES[6], "float32", segment=segment)


def test_kernel_takes_a_basis_of_each_sequence(backend: Backend, reference: Backend) -> None:
    args = arguments(backend, "rebuild_rows keys", make_inputs(backend, CASES[4], "float32"))
    wide = torch.cat([args[0].basis, torch.full_like(args[0].basis, torch.nan)], dim=1)
    view = args[0]._replace(basis=wide[:, : args[0].basis.shape[1]])
    assert not view.basis.is_contiguous() and view.basis.shape[0] == 2
    error = kernel_error(
        backend.rebuild_rows, backend, reference, "rebuild_rows keys", (view, args[1].long())
    )
    assert error <= TOLERANCE["float32"]
    one = args[0]._replace(basis=args[0].basis[:1])
    error = kernel_error(
        backend.rebuild_rows, backend, reference, "rebuild_rows keys", (one, args[1])
    )
    assert error <= TOLERANCE["float32"]


def test_weigh_rows_takes_wide_row_numbers_and_any_strides(
    backend: Backend, reference: Backend
) -> None:
    args = arguments(backend, "weigh_rows", make_inputs(backend, CASES[4], "float32"))
    latent, rows, weights = args
    turned = weights.transpose(0, 2).contiguous().transpose(0, 2)
    assert rows.dtype == torch.int32 and not turned.is_contiguous()
    args = latent, rows.long(), turned
    got = backend.weigh_rows(*args)
    assert torch.equal(got, backend.weigh_rows(latent, rows, weights))
    error = kernel_error(backend.weigh_rows, backend, reference, "weigh_rows", args)
    assert error <= TOLERANCE["float32"]


def test_weigh_rows_of_no_rows_is_zero(backend: Backend) -> None:
    args = arguments(backend, "weigh_rows", make_inputs(backend, CASES[0], "float32"))
    got = backend.weigh_rows(args[0], args[1][..., :0], args[2][..., :0])
    assert got.shape[-1] == CASES[0].rank_v and not got.any()


@pytest.mark.parametrize("start", [100_000, 1_000_000])
def test_rebuild_rows_far_positions(backend: Backend, start: int) -> None:
    # float32 angles are coarse out here, and are part of the definition: the cosines are not
    stored, rows = arguments(
        backend, "rebuild_rows keys", make_inputs(backend, CASES[0], "float32")
    )
    got = backend.to_numpy(backend.rebuild_rows(stored._replace(start=start), rows))
    half, ids = CASES[0].head_dim // 2, backend.to_numpy(rows)[0]
    inverse = np.float32(1) / np.array(stored.rope_runs[0].spec.freqs, np.float32)
    angles = (np.float32(start + ids)[..., None] * inverse).astype(np.float64)
    latent = backend.to_numpy(stored.latent.arrays[0])[0].astype(np.float64)
    basis = backend.to_numpy(stored.basis)[0].astype(np.float64)
    keys = np.einsum("hsr,rhd->hsd", latent[ids], basis)
    x, y = keys[..., :half], keys[..., half:]
    turned = [x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)]
    assert relative_error(got[0], np.concatenate(turned, axis=-1)) <= 1e-6


@pytest.mark.parametrize("operation", OPERATIONS)
def test_index_reads_no_words_but_the_first_bands(
    backend: Backend, reference: Backend, operation: str
) -> None:
    """What is left out there changes what is rebuilt, and nothing that is scored."""
    inputs = make_inputs(backend, CASES[6], "float32")
    args = arguments(backend, operation, inputs)

    def flip(latent: Latent) -> Latent:
        words, *others = latent.arrays
        is_first = torch.arange(words.shape[-1], device=words.device) < 16
        return Latent((torch.where(is_first, words, ~words), *others), latent.bits)

    changed = mapped(args, flip, Latent)
    run = getattr(backend, operation.split()[0])
    assert torch.equal(run(*args), run(*changed)) == (operation == "index_scores")


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_use_check_passes(backend: Backend, case: DecodeCase, dtype: str) -> None:
    checked = xkv.load_backend("torch", device=str(backend.device), kernels="on")
    inputs = make_inputs(backend, case, dtype)
    for operation in OPERATIONS:
        name = operation.split()[0]
        getattr(checked, name)(*arguments(backend, operation, inputs))
        assert checked.kernels.last_path[name] == name
