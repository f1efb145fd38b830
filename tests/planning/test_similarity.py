"""Similarity of layers against a plain reference, and partitions against all that there are."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from xkv import InputError, make_groups
from xkv.config import XKVConfig
from xkv.planning.similarity import best_partition, cka, within_similarity

TOLERANCE = 1e-5


@pytest.fixture(params=["mlx_backend", "reference"])
def backend(request):
    return request.getfixturevalue(request.param)


def make_layers(n_layers: int = 4, n_rows: int = 90) -> list[np.ndarray]:
    """Layers that share some of their directions, of several widths, away from zero."""
    random = np.random.default_rng(5)
    shared = random.standard_normal((n_rows, 6))
    return [
        (
            shared @ random.standard_normal((6, 8 + 4 * i))
            + i * random.standard_normal((n_rows, 8 + 4 * i))
            + 3
        ).astype(np.float32)
        for i in range(n_layers)
    ]


def naive_cka(left: np.ndarray, right: np.ndarray) -> float:
    """CKA of two layers from centred Gram matrices over rows, in float64."""
    n_rows = len(left)
    centre = np.eye(n_rows) - np.full((n_rows, n_rows), 1 / n_rows)
    a, b = (centre @ (x.astype(np.float64) @ x.T) @ centre for x in (left, right))
    return float(np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b)))


def test_cka_agrees_with_the_naive_form(backend):
    layers = make_layers()
    want = np.array([[naive_cka(left, right) for right in layers] for left in layers])
    assert want[1, 2] < 0.95 and want[0, 1] > 0.2
    got = cka(backend, [backend.from_numpy(x) for x in layers])
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_cka_ignores_rotation_scale_and_offset(backend):
    layers = make_layers(2)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    turned = (layers[1] @ turn * 40 + 7).astype(np.float32)
    got = cka(backend, [backend.from_numpy(x) for x in (*layers, turned)])
    assert got[1, 2] == pytest.approx(1, abs=TOLERANCE)
    assert got[0, 2] == pytest.approx(got[0, 1], abs=TOLERANCE)


def test_cka_of_constant_rows_is_zero(backend):
    rows = make_layers(1)[0]
    constant = np.broadcast_to(np.float32([0.1, -3.3, 7e3]), (90, 3)).copy()
    zero = np.zeros((90, 4), np.float32)
    got = cka(backend, [backend.from_numpy(x) for x in (rows, constant, zero)])
    np.testing.assert_array_equal(got, np.eye(3))


def contiguous_partitions(n_layers: int, n_groups: int):
    for cuts in combinations(range(1, n_layers), n_groups - 1):
        bounds = (0, *cuts, n_layers)
        yield [tuple(range(a, b)) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("n_layers", [1, 2, 5, 8])
def test_partition_is_the_best_of_all(n_layers):
    random = np.random.default_rng(n_layers)
    for _ in range(10):
        x = random.random((n_layers, n_layers))
        similarity = (x + x.T) / 2
        for n_groups in range(1, n_layers + 1):
            best = max(
                within_similarity(similarity, groups)
                for groups in contiguous_partitions(n_layers, n_groups)
            )
            groups = best_partition(similarity, n_groups)
            assert len(groups) == n_groups
            assert sum(groups, ()) == tuple(range(n_layers))
            assert within_similarity(similarity, groups) == pytest.approx(best, abs=1e-12)


def test_partition_finds_planted_blocks():
    blocks = np.repeat([0, 1, 2], [3, 1, 4])
    similarity = np.where(blocks[:, None] == blocks, 0.9, 0.2) + 0.1 * np.eye(8)
    assert best_partition(similarity, 3) == ((0, 1, 2), (3,), (4, 5, 6, 7))


def test_partition_keeps_kinds_apart():
    kinds = ["a", "b", None, "a", "b", "b", "a"]
    groups = best_partition(np.ones((7, 7)), 3, kinds)
    assert make_groups(XKVConfig(groups=groups), 7, kinds) == groups
    assert sorted(sum(groups, ())) == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("n_groups", [0, 1, 4])
def test_partition_refuses_impossible_numbers(n_groups):
    with pytest.raises(InputError, match="3 layers of 2 kinds"):
        best_partition(np.ones((3, 3)), n_groups, ["a", "a", "b"])
