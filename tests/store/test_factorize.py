"""Properties of the factorization, on MLX in float32 and on the float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv import InputError, factorize, load_backend
from xkv.checks.tolerances import TOLERANCE, relative_error

N_LAYERS, N_KV_HEADS, HEAD_DIM = 3, 2, 8
WIDTH = N_LAYERS * N_KV_HEADS * HEAD_DIM
BACKENDS = {"mlx": ("mlx", np.float32), "reference": ("torch", np.float64)}


def make_layers(n_tokens: int, decay: float, seed: int) -> list[np.ndarray]:
    """Layers whose joint singular values fall like ``(i + 1) ** -decay``."""
    random = np.random.default_rng(seed)
    rank = min(n_tokens, WIDTH)
    left, _ = np.linalg.qr(random.standard_normal((n_tokens, rank)))
    right, _ = np.linalg.qr(random.standard_normal((WIDTH, rank)))
    joint = (left * (1.0 + np.arange(rank)) ** -decay) @ right.T
    return [x.reshape(n_tokens, N_KV_HEADS, HEAD_DIM) for x in np.split(joint, N_LAYERS, axis=1)]


def product(layers: list[np.ndarray], rank: int, name: str) -> np.ndarray:
    """``latent @ bases`` as ``[L, WIDTH]``."""
    backend_name, dtype = BACKENDS[name]
    backend = load_backend(backend_name, **({"device": "cpu"} if name == "reference" else {}))
    arrays = [backend.from_numpy(layer.astype(dtype)) for layer in layers]
    latent, bases, spectrum = factorize(backend, arrays, rank)
    assert latent.shape == (len(layers[0]), rank) and spectrum.shape == (rank,)
    assert all(basis.shape == (rank, N_KV_HEADS, HEAD_DIM) for basis in bases)
    columns = [backend.to_numpy(basis).reshape(rank, -1) for basis in bases]
    return backend.to_numpy(latent).astype(np.float64) @ np.concatenate(columns, axis=1)


def joint_matrix(layers: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([layer.reshape(len(layer), -1) for layer in layers], axis=1)


shapes = {
    "n_tokens": st.sampled_from([1, 7, WIDTH - 1, WIDTH, 150]),
    "decay": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rank=st.integers(1, WIDTH), **shapes)
def test_factorize_stays_near_the_optimal_truncation(name, rank, n_tokens, decay, seed):
    layers = make_layers(n_tokens, decay, seed)
    singular = np.linalg.svd(joint_matrix(layers), compute_uv=False)
    optimal = np.sqrt((singular[rank:] ** 2).sum())
    error = np.linalg.norm(product(layers, rank, name) - joint_matrix(layers))
    assert error <= 1.02 * optimal + 1e-5 * np.linalg.norm(singular)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(ranks=st.lists(st.integers(1, WIDTH), min_size=2, max_size=5).map(sorted), **shapes)
def test_factorize_error_never_rises_with_rank(name, ranks, n_tokens, decay, seed):
    layers = make_layers(n_tokens, decay, seed)
    joint = joint_matrix(layers)
    errors = [np.linalg.norm(product(layers, rank, name) - joint) for rank in ranks]
    slack = 1e-5 * np.linalg.norm(joint)
    for lower, higher in itertools.pairwise(errors):
        assert higher <= 1.02 * lower + slack


@pytest.mark.parametrize("name", BACKENDS)
def test_factorize_full_rank_is_exact(name):
    layers = make_layers(150, 0.5, seed=1)
    assert relative_error(product(layers, WIDTH, name), joint_matrix(layers)) < TOLERANCE["float32"]


@pytest.mark.parametrize("rank", [1, 20, WIDTH])
def test_factorize_agrees_across_backends_on_the_product(rank):
    layers = [layer.astype(np.float32).astype(np.float64) for layer in make_layers(150, 1.0, 3)]
    got, want = (product(layers, rank, name) for name in BACKENDS)
    assert relative_error(got, want) < TOLERANCE["float32"]


def test_factorize_spectrum_is_the_singular_values(reference):
    layers = make_layers(150, 1.0, seed=2)
    spectrum = factorize(reference, [reference.from_numpy(x) for x in layers], 10).spectrum
    singular = np.linalg.svd(joint_matrix(layers), compute_uv=False)[:10]
    np.testing.assert_allclose(reference.to_numpy(spectrum), singular, rtol=1e-3)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_factorize_takes_rank_deficient_layers(mlx_backend, fill):
    layers = [np.full((20, N_KV_HEADS, HEAD_DIM), fill)] * N_LAYERS
    np.testing.assert_allclose(product(layers, 12, "mlx"), joint_matrix(layers), atol=1e-5)


def test_factorize_batches_are_independent(mlx_backend):
    pairs = [make_layers(60, 1.0, seed) for seed in (4, 5)]
    stacked = [
        mlx_backend.from_numpy(np.stack(x).astype(np.float32)) for x in zip(*pairs, strict=True)
    ]
    latent, bases, _ = factorize(mlx_backend, stacked, 9)
    for i, layers in enumerate(pairs):
        columns = [mlx_backend.to_numpy(basis)[i].reshape(9, -1) for basis in bases]
        got = mlx_backend.to_numpy(latent)[i] @ np.concatenate(columns, axis=1)
        assert relative_error(got, product(layers, 9, "mlx")) < TOLERANCE["float32"]


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_factorize_refuses_a_rank_out_of_range(mlx_backend, rank):
    layers = [mlx_backend.from_numpy(x) for x in make_layers(10, 1.0, 0)]
    with pytest.raises(InputError, match=f"rank={rank} is not in 1 to the joint width {WIDTH}"):
        factorize(mlx_backend, layers, rank)


def test_factorize_refuses_layers_of_different_shapes(mlx_backend):
    layers = [mlx_backend.xp.zeros((10, 2, 8)), mlx_backend.xp.zeros((10, 2, 16))]
    with pytest.raises(InputError, match=r"\(10, 2, 8\), \(10, 2, 16\)"):
        factorize(mlx_backend, layers, 4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rank", [2, WIDTH])
def test_factorize_refuses_numbers_that_are_not_finite(name, rank):
    layers = make_layers(150, 1.0, seed=4)
    layers[1][3, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        product(layers, rank, name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rank", [40, 200, 600])  # by the rows, by the Gram matrix, all at once
def test_products_in_16_bits_stay_within_one_percent_of_the_exact_truncation(
    rank, dtype, monkeypatch
):
    backend = load_backend("torch", device="cpu")
    random = np.random.default_rng(0)
    columns = np.exp(-np.arange(1536) / 100) + 0.003
    mixed = random.standard_normal((700, 1536)) * columns @ random.standard_normal((1536, 1536))
    joint = torch.from_numpy(mixed).to(getattr(torch, dtype)).float()  # as a cache holds them
    layers = [x.unflatten(-1, (8, 64)) for x in joint.chunk(3, dim=1)]
    monkeypatch.setattr(backend, "product_dtype", lambda _: getattr(torch, dtype))
    latent, bases, _ = factorize(backend, layers, rank)
    assert latent.dtype == torch.float32
    got = latent @ torch.cat([basis.flatten(1) for basis in bases], dim=1)
    optimal = torch.linalg.svdvals(joint.double())[rank:].square().sum().sqrt()
    assert (got - joint).norm() <= 1.01 * optimal


def test_cuda_multiplies_16_bits_into_float32(monkeypatch):
    """Shapes and dtypes only: tensors without memory."""
    backend = load_backend("torch", device="cpu")
    assert backend.product_dtype(torch.bfloat16) is None
    monkeypatch.setattr(backend, "device", torch.device("cuda"))
    assert backend.product_dtype(torch.bfloat16) == torch.bfloat16
    assert backend.product_dtype(torch.float32) is None
    rows = torch.empty((2, 3, 50, 8), dtype=torch.bfloat16, device="meta")
    product = backend.wide_product(rows.mT, rows)
    assert product.shape == (2, 3, 8, 8) and product.dtype == torch.float32
