"""The kernel that scores chunks, against the float64 reference."""

from __future__ import annotations

import pytest

from tests.torch_cuda.triton_kernels.checks import (
    make_scores_case,
    needs_triton,
    scores_error,
)
from xkv.checks.decode_cases import DTYPES
from xkv.checks.tolerances import TOLERANCE
from xkv.ops.backend import Backend

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_chunks", "head_dim", "bits", "sharing"),
    [
        (1, 64, 8, 1),
        (63, 64, 8, 4),
        (64, 64, 4, 4),
        (65, 32, 8, 1),
        (65, 32, 4, 8),
        (129, 128, 8, 3),
        (33, 256, 16, 1),
        (1025, 64, 16, 2),
    ],
)
def test_chunk_scores_matches_reference(
    backend: Backend,
    reference: Backend,
    n_chunks: int,
    head_dim: int,
    bits: int,
    sharing: int,
    dtype: str,
) -> None:
    args = make_scores_case(backend, dtype, n_chunks, head_dim, bits, sharing)
    got = backend.chunk_scores(*args)
    assert backend.kernels.last_path["chunk_scores"] == "chunk_scores"
    # float32 from the products on, whatever the landmarks' dtype
    assert scores_error(got, args, reference) <= TOLERANCE["float32"]
