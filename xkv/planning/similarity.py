"""How alike layers are, and which of them should share a latent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array

NO_VARIANCE = 1e-12
"""Rows whose centred energy is below this share of their energy are constant but for rounding."""


def cka(backend: Backend, layers: Sequence[Array]) -> np.ndarray:
    """Linear centred kernel alignment (CKA) of every two layers.

    With centred rows X and Y it is ``|X^T Y|^2 / (|X^T X| |Y^T Y|)`` in Frobenius norms: 1 for rows
    that differ by a rotation and a factor, 0 for uncorrelated ones. Fewer rows than columns make
    it too large.

    Args:
        layers: One array per layer, ``[L, width]``, any float dtype; widths may differ.

    Returns:
        ``[n_layers, n_layers]`` float64. Constant rows are like no other layer: 0, and 1 on the
        diagonal.

    Source: Kornblith et al., arXiv:1905.00414.
    """
    xp = backend.xp
    centred, norms = [], []
    for rows in layers:
        wide = xp.astype(rows, backend.accumulate_dtype(rows))
        energy = xp.sum(wide * wide)
        wide = wide - xp.mean(wide, axis=0, keepdims=True)
        variance = xp.sum(wide * wide)
        is_constant = float(variance) <= NO_VARIANCE * float(energy)
        # unit rows keep the products of any input within range
        wide = wide * (0.0 if is_constant else float(variance) ** -0.5)
        centred.append(wide)
        norms.append(1.0 if is_constant else _squared_norm(backend, wide, wide) ** 0.5)
    similarity = np.eye(len(layers))
    for i, left in enumerate(centred):
        for j, right in enumerate(centred[:i]):
            product = _squared_norm(backend, left, right) / (norms[i] * norms[j])
            similarity[i, j] = similarity[j, i] = product
    return similarity


def _squared_norm(backend: Backend, left: Array, right: Array) -> float:
    product = backend.xp.matrix_transpose(left) @ right
    return float(backend.xp.sum(product * product))


def within_similarity(similarity: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """How alike the layers of each group are: the mean over all layers, 1 at most.

    A layer counts with its mean similarity to the layers of its group, itself included, so that a
    group of W layers adds the sum over its pairs divided by W. CKA is an inner product of unit
    vectors (the centred Gram matrices), for which this is 1 minus the mean squared distance of the
    layers to the centre of their group: the objective of k-means. The plain sum over pairs, which
    grows with the square of W, would make one group as large as it can be.
    """
    n_layers = sum(map(len, groups))
    return sum(similarity[np.ix_(group, group)].sum() / len(group) for group in groups) / n_layers


def best_partition(
    similarity: np.ndarray, n_groups: int, kinds: Sequence[Hashable | None] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The groups of neighbouring layers with the largest :func:`within_similarity`.

    Dynamic programming over where groups end, so that the result is the best one that there is.

    Args:
        similarity: ``[n_layers, n_layers]``, symmetric.
        n_groups: Groups to make.
        kinds: As in :func:`xkv.make_groups`: only layers of one kind share a group, and neighbours
            are those of one kind that follow each other; None leaves a layer out.

    Returns:
        Tuples of layer indices.

    Raises:
        InputError: If there are fewer layers than groups, or more kinds.
    """
    kinds = [0] * len(similarity) if kinds is None else kinds
    by_kind: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(kinds):
        if kind is not None:
            by_kind.setdefault(kind, []).append(layer)
    # one kind after the other, so that groups are runs of this order
    order = [layer for layers in by_kind.values() for layer in layers]
    n_layers = len(order)
    if not len(by_kind) <= n_groups <= n_layers:
        raise InputError(
            f"{n_layers} layers of {len(by_kind)} kinds cannot be {n_groups} groups: ask for "
            f"{len(by_kind)} to {n_layers}"
        )
    best = np.full((n_groups + 1, n_layers + 1), -np.inf)
    begins = np.zeros((n_groups + 1, n_layers + 1), dtype=int)
    best[0, 0] = 0
    for end in range(1, n_layers + 1):
        for begin in range(end - 1, -1, -1):
            run = order[begin:end]
            if kinds[run[0]] != kinds[run[-1]]:
                break
            gain = similarity[np.ix_(run, run)].sum() / len(run)
            for count in range(1, n_groups + 1):
                if best[count - 1, begin] + gain > best[count, end]:
                    best[count, end] = best[count - 1, begin] + gain
                    begins[count, end] = begin
    groups, end = [], n_layers
    for count in range(n_groups, 0, -1):
        groups.append(tuple(order[begins[count, end] : end]))
        end = begins[count, end]
    return tuple(sorted(groups))
