"""The model's own basis: measured once on other texts, shared by all its conversations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.index import rows_of_index
from xkv.ops.packed import Packed
from xkv.store.bit_plan import Columns, arrange, plan_bits
from xkv.store.prompt_basis import take_bands
from xkv.store.rotation import rotate_bands
from xkv.store.store import Basis
from xkv.store.svd import split_layers

MAX_PLANS = 4
"""Plans, at most, whose columns are kept for the next conversation."""

BandBits = tuple[int, ...]
"""Of the latent's bands in order; with 0 a band is left out."""

_LOADED: weakref.WeakValueDictionary[tuple[str, str, str], ModelBasis] = (
    weakref.WeakValueDictionary()
)
"""By name and device: a cache that comes from a file finds the one it was made with."""


class Directions(NamedTuple):
    """Of one group's keys, or values, as they are in a file."""

    rows: np.ndarray
    """``[r, width]`` float16, by falling energy: orthonormal once multiplied by the scales."""
    scales: np.ndarray
    """``[width]`` float32: how much an error in a column counts, as a factor."""
    energies: np.ndarray
    """``[r]`` float64: what leaving each out costs, in one unit for all tensors."""
    heads: tuple[int, int, int]
    """Layers, KV heads of each, and features."""


Weights = tuple[tuple[float, ...], ...]
"""On the energies of each group's keys, and values; only their proportions count."""

KEY_WEIGHT = 2.0
"""On errors of keys, where nothing was measured."""


def prior_weights(directions: Sequence[Sequence[Directions]]) -> Weights:
    """Weights by which all tensors count alike, keys for more: gradients hold for small errors."""
    return tuple(
        tuple(
            # the first direction is, nearly, the mean of the rows
            (1.0 if part else KEY_WEIGHT) / (float(tensor.energies[1:].sum()) or 1.0)
            for part, tensor in enumerate(group)
        )
        for group in directions
    )


@dataclass(eq=False)
class ModelBasis:
    """A calibration on one device.

    Args:
        backend: Whose arrays are made of it.
        uid: Names the calibration.
        groups: Layer indices of each group.
        directions: Of each group's keys, and values where they are stored.
    """

    backend: Backend
    uid: str
    groups: tuple[tuple[int, ...], ...]
    directions: tuple[tuple[Directions, ...], ...]
    weights: Mapping[float, Weights] = field(default_factory=dict)
    """By ratio of dense bytes to bytes of latents: see :mod:`xkv.planning.tensor_weights`."""
    _bases: dict[Any, Basis] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _LOADED[self.uid, self.backend.name, self.backend.device_name] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelBasis:
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that the model holds for the columns of all plans so far."""
        bases = self._bases.values()
        scales = sum(basis.scales.nbytes for basis in bases if basis.scales is not None)
        return scales + sum(x.nbytes for basis in bases for x in (*basis.layers, *basis.index_rows))

    def column_bytes(self, bits: Sequence[Sequence[BandBits]], item_bytes: int) -> int:
        """Bytes of the columns of a plan, whether they were made or not.

        Args:
            bits: Of each group's keys, and values.
            item_bytes: Of a number in the KV dtype; a step may compute, and hold them, in more.
        """
        xp = self.backend.xp
        item_bytes = max(
            item_bytes, xp.zeros((), dtype=self.backend.step_dtype(xp.float16)).itemsize
        )
        return sum(
            BAND * sum(map(bool, bands)) * len(each.scales) * item_bytes
            for group, plans in zip(self.directions, bits, strict=True)
            for each, bands in zip(group, plans, strict=True)
        )

    def columns(self, number: int, bits: Sequence[BandBits], dtype: Any) -> list[Basis]:
        """Bases of group ``number`` for keys, and for values, with bands in these bits.

        Rounded to ``dtype``, that of rows, and held in that of a decode step.
        """
        bases = []
        for part, each in enumerate(bits):
            key = number, part, each, str(dtype)
            if key not in self._bases:
                self._bases[key] = self._made(self.directions[number][part], each, dtype)
            bases.append(self._bases[key])
        # conversations keep what they use
        limit = MAX_PLANS * sum(map(len, self.directions))
        for key in list(self._bases)[:-limit]:
            del self._bases[key]
        return bases

    def _made(self, found: Directions, bits: BandBits, dtype: Any) -> Basis:
        backend, (n_rows, width) = self.backend, found.rows.shape
        order = sorted((i for i, n in enumerate(bits) if n), key=lambda i: (-bits[i], i))
        rows = found.rows[arrange(n_rows, len(bits))].astype(np.float32)
        rows = np.pad(rows, ((0, -n_rows % BAND), (0, 0)))
        joint = backend.from_numpy(rows.reshape(1, -1, 1, width))
        joint = rotate_bands(backend, take_bands(backend, joint, order), dtype)
        layers = split_layers(backend, joint[:, :, 0], *found.heads)
        index = [backend.own(rows_of_index(backend, layer, True)) for layer in layers]
        # once, and not in each step
        wide = backend.step_dtype(dtype)
        held = [backend.xp.astype(x, wide) for x in (*layers, *index)]
        backend.evaluate(*held)
        return Basis(
            tuple(map(Packed.plain, held[: len(layers)])),
            tuple(bits[i] for i in order),
            is_shared=True,
            index_rows=tuple(held[len(layers) :]),
            scales=backend.from_numpy(found.scales),
        )

    def plan(
        self, row_bytes: float, item_bytes: int, max_key_rank: int | None
    ) -> tuple[tuple[BandBits, ...], ...] | None:
        """The bits of each group's bands that lose least.

        Args:
            row_bytes: Of one token's latents in all groups.
            item_bytes: Of a number in the KV dtype.
            max_key_rank: Columns of keys that a group keeps at most.

        Returns:
            Bits of keys, and of values, by group; None if the bytes do not hold a band of each.
        """
        n_columns = sum(len(each.scales) for group in self.directions for each in group)
        ratio = item_bytes * n_columns / row_bytes
        known = min(self.weights, key=lambda known: abs(math.log(known / ratio)), default=None)
        weights = prior_weights(self.directions) if known is None else self.weights[known]
        limits = (max_key_rank and max(max_key_rank // BAND, 1), None)
        tensors = [
            Columns(each.energies * weight, 1, item_bytes, max_bands=limit)
            for group, mine in zip(self.directions, weights, strict=True)
            for each, weight, limit in zip(group, mine, limits, strict=False)
        ]
        found = plan_bits(tensors, row_bytes)
        if found is None:
            return None
        bits = iter(tuple(option.latent_bits for option in bands) for bands in found)
        return tuple(tuple(next(bits) for _ in group) for group in self.directions)


def loaded_basis(backend: Backend, uid: str) -> ModelBasis | None:
    """The calibration of this name on a device, None if it is not loaded."""
    return _LOADED.get((uid, backend.name, backend.device_name))
