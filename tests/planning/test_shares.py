"""Shares of the budget: what the spectra ask for, against all other choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xkv.planning.shares import LIMIT, JointSpectrum, budget_shares


def spectrum(energies: list[float], n_layers: int = 1, width: int = 8) -> JointSpectrum:
    return JointSpectrum(np.array(energies), sum(energies), n_layers, width)


def test_joint_spectrum_is_the_svds(mlx_backend, reference):
    rows = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float32) + 1
    want = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    for backend in (mlx_backend, reference):
        for cut in (20, 12):
            wide = backend.from_numpy(np.ascontiguousarray(rows[:, :cut]))
            got = JointSpectrum.of(backend, [wide[:, :5], wide[:, 5:]])
            want = np.linalg.svd(rows[:, :cut].astype(np.float64), compute_uv=False)
            np.testing.assert_allclose(got.singular_values[:10], want[:10], rtol=1e-4)
            assert got.variance == pytest.approx(((rows - rows.mean(0)) ** 2)[:, :cut].sum())
            assert got.left_out()[0] == 1 and got.left_out()[-1] == 0
            assert got.left_out()[3] == pytest.approx(
                np.linalg.norm(want[3:]) / np.linalg.norm(want)
            )


def test_shares_leave_the_least_error_of_all():
    random = np.random.default_rng(2)
    tensors = [
        spectrum(np.sort(random.random(20) ** 3)[::-1].tolist(), n_layers, width=20)
        for n_layers in (1, 1, 2)
    ]
    n_columns = 18
    # a column costs 100 + 20, and 18 of them fit
    shares = budget_shares([[x] for x in tensors], 100, ratio=3 * 100 * 20 / (120 * 18.5))

    def error(columns: tuple[int, ...]) -> float:
        return sum(x.n_layers * x.left_out()[n] ** 2 for x, n in zip(tensors, columns, strict=True))

    every = [x for x in np.ndindex(19, 19, 19) if sum(x) == n_columns]
    best = min(every, key=error)
    assert len(set(best)) > 1 and all(3 <= n <= 12 for n in best)
    assert shares == pytest.approx([n / n_columns for n in best])


def test_shares_follow_the_spectra_within_limits():
    fast, slow = spectrum([100, *[0.01] * 7]), spectrum([10.0] * 8)
    # at these bytes four columns: the fast one's first, then the slow one's
    uneven = budget_shares([[fast], [slow]], n_rows=100, ratio=3.5)
    assert uneven == pytest.approx((0.25, 0.75))
    none = budget_shares([[fast], [replace(slow, variance=0.0)]], n_rows=100, ratio=4)
    assert sum(none) == pytest.approx(1) and none[1] == pytest.approx(0.5 / LIMIT)
    nothing = [replace(slow, variance=0.0, n_layers=n, width=8 * n) for n in (1, 3)]
    assert budget_shares([[x] for x in nothing], n_rows=100) == pytest.approx((0.25, 0.75))
