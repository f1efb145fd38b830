"""Sums over prompts of any length, and weights below 16 bits' normal numbers."""

from __future__ import annotations

import numpy as np
import pytest

from xkv import load_backend
from xkv.ops.attention import attend_all, raised_weights
from xkv.ops.scores import Dense
from xkv.ops.types import RopeRun, Segment, Stored
from xkv.store.codec import pack_latent
from xkv.store.linear_algebra import energy
from xkv.store.prompt_basis import measure, plain_basis
from xkv.store.store import store_rows


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param, kernels="off")


@pytest.fixture(scope="module")
def long_rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 65_536, 4, 64)).astype(np.float32)


def test_sums_over_a_long_prompt_lose_nothing(backend, long_rows):
    exact = float((long_rows.astype(np.float64) ** 2).sum())
    rows = backend.from_numpy(long_rows)
    assert energy(backend, rows) == pytest.approx(exact, rel=1e-5)


def test_the_reported_error_is_the_true_one(backend, long_rows):
    """At half of the rank of white rows, half of the energy is lost."""

    def read(start, end):
        return [backend.from_numpy(long_rows[:, start:end])]

    dtype = backend.xp.float32
    spectrum = measure(backend, read, 32_768, 128, dtype, power_iterations=3, seed=0)
    found = store_rows(backend, plain_basis(backend, spectrum, dtype), read, 32_768, dtype, None)
    basis = backend.to_numpy(found.basis.layers[0].unpack(backend)).reshape(128, -1)
    flat = long_rows[0, :32_768].reshape(-1, 256).astype(np.float64)
    lost = ((flat - backend.to_numpy(found.latent.unpack(backend))[0] @ basis) ** 2).sum()
    assert found.lost == pytest.approx(lost, rel=1e-3)
    assert found.total == pytest.approx((flat**2).sum(), rel=1e-5)


@pytest.mark.parametrize("bits", [(), (4,), (8, 3, 2)])
def test_no_rows_unpack_to_no_rows(backend, bits):
    rows = backend.from_numpy(np.ones((1, 5, 64 * max(len(bits), 1)), np.float32))
    got = pack_latent(backend, rows, bits).rows(3, 3).unpack(backend)
    assert tuple(got.shape) == (1, 0, rows.shape[-1]) and got.dtype == rows.dtype


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_flat_softmax_keeps_its_mass_in_float16(backend, is_packed):
    """100,000 equal weights are below float16's smallest normal number."""
    xp, n_rows = backend.xp, 100_000
    random = np.random.default_rng(0)
    latents = [
        backend.from_numpy((random.standard_normal((1, n_rows, 64)) + 0.5).astype(np.float16))
        for _ in range(2)
    ]
    bases = [
        backend.from_numpy((random.standard_normal((1, 64, 1, 32)) / 8).astype(np.float16))
        for _ in range(2)
    ]
    values = backend.to_numpy(latents[1])[0].astype(np.float64) @ (
        backend.to_numpy(bases[1])[0, :, 0].astype(np.float64)
    )
    bits = (8,) if is_packed else ()
    segment = Segment(
        *(
            Stored(pack_latent(backend, latent, bits), basis, 0, runs)
            for latent, basis, runs in zip(
                latents, bases, ((RopeRun(n_rows, None),), ()), strict=True
            )
        )
    )
    queries, keys = (
        backend.from_numpy(np.zeros(size, np.float16)) for size in ((1, 2, 1, 32), (1, 1, 4, 32))
    )
    got = backend.to_numpy(attend_all(backend, queries, segment, Dense(keys, keys), 1.0)).astype(
        np.float64
    )
    want = values.sum(0) / (n_rows + 4)
    assert np.linalg.norm(got[0, 0, 0] - want) < 2e-3 * np.linalg.norm(want)
    flat = backend.from_numpy(np.full((1, n_rows), 1 / n_rows, np.float32))
    weights, raised = raised_weights(backend, flat, xp.float16)
    smallest = float(np.finfo(np.float16).smallest_normal)
    assert backend.to_numpy(weights).min() >= smallest and raised * 1.0 <= 65504
    assert raised_weights(backend, flat, xp.float32)[1] == 1
