"""Which share of the factors' bytes each group of layers should get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.similarity import NO_VARIANCE

SHARED_RATIO = 8.0
"""Dense bytes to bytes of the factors at which shares are measured."""

LIMIT = 2.0
"""A share is at most this many times its group's share of the dense bytes, and at least 1 / this
many: a calibration prompt says little about rarer ones.
"""


@dataclass(frozen=True)
class JointSpectrum:
    """The keys, or the values, of one group of layers.

    Args:
        energies: Squared singular values of the layers side by side, falling, float64.
        variance: Squared norm of the rows less their mean; 0 if they are constant.
        n_layers: Layers of the group.
        width: Columns of all layers side by side.
    """

    energies: np.ndarray
    variance: float
    n_layers: int
    width: int

    @classmethod
    def of(cls, backend: Backend, layers: Sequence[Array]) -> JointSpectrum:
        """Measure a group.

        Args:
            layers: One array per layer, ``[L, width]``, any float dtype.
        """
        xp = backend.xp
        dtype = backend.accumulate_dtype(layers[0])
        rows = xp.concat([xp.astype(layer, dtype) for layer in layers], axis=-1)
        n_rows, width = rows.shape
        across = xp.matrix_transpose(rows)
        gram = across @ rows if width <= n_rows else rows @ across
        # only the values: a backend's eigh would compute the vectors too
        energies = np.linalg.eigvalsh(backend.to_numpy(gram).astype(np.float64))
        energies = np.clip(energies[::-1], 0, None)
        variance = float(xp.sum((rows - xp.mean(rows, axis=0, keepdims=True)) ** 2))
        if variance <= NO_VARIANCE * energies.sum():
            variance = 0.0
        return cls(energies, variance, len(layers), width)

    @property
    def singular_values(self) -> np.ndarray:
        """Falling, float64."""
        return np.sqrt(self.energies)

    def left_out(self) -> np.ndarray:
        """Relative error of the best factors of each rank from 0 on."""
        rest = np.append(np.cumsum(self.energies[::-1])[::-1], 0.0)
        return np.sqrt(rest / rest[0]) if rest[0] else rest


def budget_shares(
    groups: Sequence[Sequence[JointSpectrum]], n_rows: int, ratio: float = SHARED_RATIO
) -> tuple[float, ...]:
    """Shares of the factors' bytes with the smallest sum of squared relative errors.

    Columns go to the groups by water-filling: the next column is always the one that removes the
    most error for its bytes. A column costs ``n_rows + width`` elements, its row of the basis
    included, and removes its squared singular value as a share of the tensor's variance, times the
    number of layers, so that a group counts by its layers and not by how large its rows are. As
    singular values fall, no other choice of as many bytes leaves less error. Columns of 16 bits
    stand in for those of fewer bits, whose number the planner chooses later. Shares are then
    scaled together and held within :data:`LIMIT`. A tensor without variance asks for nothing.

    Args:
        groups: The spectra of each group, those of keys and of values.
        n_rows: Rows that were measured.
        ratio: Dense bytes to bytes of the factors.

    Returns:
        One number a group, with a sum of 1.
    """
    gains, costs, owners = [], [], []
    dense = np.zeros(len(groups))
    for owner, tensors in enumerate(groups):
        for tensor in tensors:
            column = n_rows + tensor.width
            dense[owner] += n_rows * tensor.width
            removed = np.zeros_like(tensor.energies)
            if tensor.variance > 0:
                removed = tensor.n_layers * tensor.energies / tensor.variance
            gains.append(removed / column)
            costs.append(np.full(len(removed), float(column)))
            owners.append(np.full(len(removed), owner))
    gain, cost, owner_of = map(np.concatenate, (gains, costs, owners))
    order = np.argsort(-gain, kind="stable")
    order = order[(np.cumsum(cost[order]) <= dense.sum() / ratio) & (gain[order] > 0)]
    taken = np.bincount(owner_of[order], weights=cost[order], minlength=len(groups))
    return _limited(taken, dense / dense.sum())


def _limited(taken: np.ndarray, proportional: np.ndarray) -> tuple[float, ...]:
    """Shares in the ratio of ``taken`` where the limits allow it."""
    if not taken.any():
        taken = proportional
    # no group at 0, where no factor would reach the limits
    wanted = np.maximum(taken / taken.max(), 1e-9)
    low, high = 1e-12, 1e12

    def shares(factor: float) -> np.ndarray:
        return np.clip(factor * wanted, proportional / LIMIT, proportional * LIMIT)

    for _ in range(120):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if shares(middle).sum() < 1 else (low, middle)
    result = shares(high)
    return tuple((result / result.sum()).tolist())
