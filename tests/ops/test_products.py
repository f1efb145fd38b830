"""Products and conversions of a decode step, as each framework has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xkv import load_backend
from xkv.backends.torch_cuda import TorchBackend
from xkv.checks.tolerances import TOLERANCE, relative_error


@pytest.mark.parametrize("n_shared", [1, 3])
@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_sum_with_a_product_whose_matrix_sequences_share_or_have(name: str, n_shared: int) -> None:
    backend = load_backend(name)
    shapes = (3, 2, 4, 5), (3, 2, 4, 6), (n_shared, 2, 6, 5)
    x, left, right = (backend.normal(shape, seed) for seed, shape in enumerate(shapes))
    got = backend.to_numpy(backend.add_product(x, left, right))
    x, left, right = (backend.to_numpy(y).astype(np.float64) for y in (x, left, right))
    assert relative_error(got, x + left @ right) <= TOLERANCE["float32"]


def test_a_matrix_that_sequences_share_is_not_copied_for_each() -> None:
    backend = TorchBackend("cpu")
    x, left = backend.normal((3, 2, 4, 64), 0), backend.normal((3, 2, 4, 600), 1)
    right = backend.normal((1, 2, 600, 64), 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        backend.add_product(x, left, right)
    made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < made < right.nbytes


def test_conversion_to_the_same_dtype_copies_nothing() -> None:
    x = torch.ones(3)
    assert TorchBackend.xp.astype(x, torch.float32) is x
    assert TorchBackend.xp.astype(x, torch.float16).dtype == torch.float16
