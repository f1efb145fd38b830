"""A group's keys, or values, on their way into a cache: factored, then stored in chosen bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from xkv.config import BAND
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.types import Array
from xkv.store.bit_plan import Option, band_options, choose, smallest_bytes
from xkv.store.codec import pack_basis, pack_part
from xkv.store.factors import SharedFactors
from xkv.store.linear_algebra import energy, inverse
from xkv.store.rotation import rotate_bands
from xkv.store.svd import factorize

ENERGY_FLOOR = 1e-6
"""Rows whose moving share is below this are constant but for rounding."""

FIT_RIDGE = 1e-5
"""Columns this near to dependent are not corrected along what they hardly have."""

FIT_PRIOR = 1 / 16
"""Corrections are drawn to zero as if this share of a column's rounding were its own energy."""

FITTED_ROWS = 4096
"""Tokens that are widened at once when bases are fitted to a stored latent."""


class Factorization(NamedTuple):
    """A group's keys, or values, factored but not yet stored; see :func:`factor_rows`."""

    latent: Array
    """``[B, L, r]`` in the KV dtype."""
    bases: tuple[Array, ...]
    """One per layer, ``[B, r, n_kv_heads, head_dim]``."""
    total: float
    """Sum of the rows' squares."""
    lost: float
    """What of it the factors leave out."""
    moving: float
    """What of it is not the rows' mean."""
    weights: tuple[Array, ...] | None = None
    """One per layer, ``[n_kv_heads, head_dim]``: how much an error there counts."""

    def plain(self) -> SharedFactors:
        """The factors in the KV dtype."""
        error = (self.lost / self.total) ** 0.5 if self.total else 0.0
        return SharedFactors(Packed.plain(self.latent), tuple(map(Packed.plain, self.bases)), error)

    def options(self, backend: Backend, n_needed: int) -> list[list[Option]]:
        """:func:`xkv.store.bit_plan.band_options`"""
        bases: Sequence[Array] = self.bases
        if self.weights is not None:
            bases = [basis * w for basis, w in zip(bases, self.weights, strict=True)]
        return band_options(backend, self.latent, bases, self._unit, n_needed)

    @property
    def _unit(self) -> float:
        # constant rows have no energy of their own: what rounding leaves of it stands for it
        return max(self.moving, ENERGY_FLOOR * self.total) or 1.0

    def pack(self, backend: Backend, chosen: Sequence[Option]) -> SharedFactors:
        """The factors in the bits that were chosen for each band.

        The bases are fitted to the latent as it is stored, so that they make up for some of its
        rounding.
        """
        kept = [band for band, option in enumerate(chosen) if option.latent_bits]
        # bands with the same bits side by side, whatever their bases': few arrays for a kernel
        kept.sort(key=lambda band: chosen[band][2:], reverse=True)
        columns, parts = [], []
        for bits, run in itertools.groupby(kept, lambda band: chosen[band].latent_bits):
            columns.append(_take_bands(backend, self.latent, list(run), 2))
            parts.append(pack_part(backend, columns[-1], bits))
        latent = Packed(tuple(parts), 2)
        backend.evaluate(*latent.arrays)
        basis_bits = [chosen[band].basis_bits for band in kept]
        runs = [(len(list(run)), bits) for bits, run in itertools.groupby(basis_bits)]
        widths, bits_of_rows = [BAND * n for n, _ in runs], [bits for _, bits in runs]
        turn = _turn_to_stored(backend, latent, columns)
        bases = []
        for basis in self.bases:
            rows = turn_basis(backend, _take_bands(backend, basis, kept, 1), turn)
            bases.append(
                pack_basis(backend, backend.xp.astype(rows, basis.dtype), widths, bits_of_rows)
            )
            backend.evaluate(*bases[-1].arrays)
        lost = self.lost + self._unit * sum(option.error for option in chosen)
        error = min(lost / self.total, 1.0) ** 0.5 if self.total else 0.0
        return SharedFactors(latent, tuple(bases), error)


def factor_rows(
    backend: Backend,
    layers: Sequence[Array],
    rank: int,
    dtype: Any,
    *,
    weights: Sequence[Array] | None = None,
    is_rotated: bool = False,
    power_iterations: int,
    seed: int,
) -> Factorization:
    """Factor a prompt's rows, see :func:`xkv.store.svd.factorize`.

    Args:
        layers: One array per layer, ``[B, L, n_kv_heads, head_dim]`` in float32 or wider.
        rank: Columns to keep.
        dtype: The KV dtype.
        weights: One per layer, ``[n_kv_heads, head_dim]``, on the columns; None for all alike.
        is_rotated: Whether bands are spread out for quantization.

    Raises:
        InputError: If a row is not finite.
    """
    xp = backend.xp
    if weights is not None:
        layers = [layer * w for layer, w in zip(layers, weights, strict=True)]
    total = sum(energy(backend, layer) for layer in layers)
    refuse_overflow(total)
    means = [xp.mean(layer, axis=1, keepdims=True) for layer in layers]
    n_rows = layers[0].shape[1]
    moving = total - n_rows * sum(energy(backend, mean) for mean in means)
    latent, bases, spectrum = factorize(
        backend,
        layers,
        rank,
        power_iterations=power_iterations,
        seed=seed,
        # weights may take numbers out of 16 bits' range
        product_dtype=backend.product_dtype(dtype) if weights is None else None,
    )
    lost = max(total - energy(backend, spectrum), 0.0)
    if weights is not None:
        bases = tuple(basis / w for basis, w in zip(bases, weights, strict=True))
    if is_rotated:
        latent, bases = rotate_bands(backend, latent, bases, dtype)
    else:
        latent, bases = xp.astype(latent, dtype), tuple(xp.astype(x, dtype) for x in bases)
    backend.evaluate(latent, *bases)
    kept = None if weights is None else tuple(weights)
    return Factorization(latent, bases, total, lost, moving, kept)


def refuse_overflow(total: float) -> None:
    """Raise if rows whose squares sum to this are not finite."""
    if not math.isfinite(total):
        raise InputError(
            "the cache holds NaN or infinity, which cannot be factored: the model's activations "
            "overflow; run it with the full cache, or in bfloat16"
        )


def pack_together(
    backend: Backend, factored: Sequence[Factorization], budget_bytes: int, min_rank: int
) -> list[SharedFactors]:
    """Store keys and values of a group within one budget, where together they lose least.

    Raises:
        InputError: If the budget does not hold ``min_rank`` columns of each in the fewest bits.
    """
    bands = [each.options(backend, -(-min_rank // BAND)) for each in factored]
    together = [options for each in bands for options in each]
    if (needed := smallest_bytes(together)) > budget_bytes:
        raise InputError(
            f"{budget_bytes / 1e6:.3f} MB for a group's factors do not hold {min_rank} columns "
            f"each, which take {needed / 1e6:.3f} MB: ask for less compression, or a lower min_rank"
        )
    chosen = choose(together, budget_bytes)
    packed = []
    for each, options in zip(factored, bands, strict=True):
        packed.append(each.pack(backend, chosen[: len(options)]))
        chosen = chosen[len(options) :]
    return packed


def _take_bands(backend: Backend, x: Array, bands: Sequence[int], axis: int) -> Array:
    """A copy of some of a latent's columns (axis 2) or of a basis' rows (axis 1), in order."""
    slices = []
    for band in bands:
        at = slice(BAND * band, BAND * (band + 1))
        slices.append(x[..., at] if axis == 2 else x[:, at])
    return backend.own(slices[0]) if len(slices) == 1 else backend.xp.concat(slices, axis=axis)


def _turn_to_stored(backend: Backend, stored: Packed, columns: Sequence[Array]) -> Array:
    """``[B, r, r]`` whose transpose T makes ``stored @ T`` the best fit to a latent, near identity.

    Args:
        stored: ``[B, L, r]``: the latent in few bits.
        columns: The latent as it was, in parts.
    """
    xp = backend.xp
    wide = backend.accumulate_dtype(columns[0])
    n_rows = stored.shape[1]
    gram: Any = 0.0
    product: Any = 0.0
    rest: Any = 0.0
    for start in range(0, n_rows, FITTED_ROWS):
        end = min(start + FITTED_ROWS, n_rows)
        before = xp.concat([xp.astype(x[:, start:end], wide) for x in columns], axis=-1)
        after = xp.astype(stored.rows(start, end).unpack(backend), wide)
        lost = before - after
        backend.evaluate(after, lost)
        del before
        turned = xp.matrix_transpose(after)
        gram, product = gram + turned @ after, product + turned @ lost
        rest = rest + xp.sum(xp.sum(lost * lost, axis=1), axis=-1)
        backend.evaluate(gram, product, rest)
    eye = xp.eye(stored.rank, dtype=wide, **backend.placement)
    # columns of one length, so that what keeps the matrix regular costs weak ones no precision
    size = xp.sqrt(xp.sum(gram * eye, axis=-1))
    size = xp.where(size > 0, size, xp.ones_like(size))
    scaled = gram / (size[..., None] * size[..., None, :])
    # columns that hold less than rounding leaves would make up for it with steep slopes, which fit
    # these rows and no later ones
    steep = FIT_PRIOR / stored.rank * rest[..., None] / size**2
    solved = inverse(backend, scaled + (FIT_RIDGE + steep[..., None]) * eye)
    correction = xp.matrix_transpose(product / size[..., None]) @ solved / size[..., None, :]
    return correction + eye


def turn_basis(backend: Backend, basis: Array, turn: Array) -> Array:
    xp = backend.xp
    batch, rank, n_kv_heads, head_dim = basis.shape
    flat = xp.reshape(xp.astype(basis, turn.dtype), (batch, rank, n_kv_heads * head_dim))
    turned = xp.matrix_transpose(turn) @ flat
    return xp.reshape(turned, (batch, -1, n_kv_heads, head_dim))
