"""The paper's form: a basis of the prompt's own, by a joint SVD of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xkv.config import BAND
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed, group_size_of
from xkv.ops.types import Array
from xkv.store.bit_plan import Columns, Option, arrange, plan_bits
from xkv.store.codec import BASIS_BITS, basis_row_bytes, pack_basis
from xkv.store.linear_algebra import energy
from xkv.store.rotation import rotate_bands
from xkv.store.store import CHUNK_ROWS, Basis, ReadRows, joined, refuse_overflow
from xkv.store.svd import gram_matrix, leading_directions, split_layers

ENERGY_FLOOR = 1e-6
"""Rows whose moving share is below this are constant but for rounding."""


class Spectrum(NamedTuple):
    """The leading directions of a group's keys, or values; see :func:`measure`."""

    directions: Array
    """``[B, width, r]``, orthonormal columns by falling energy, in float32 or wider."""
    energies: np.ndarray
    """``[r]``: of the rows along each, sequences summed."""
    unit: float
    """What errors are shares of: the energy of the rows without their mean."""
    heads: tuple[int, int, int]
    """Layers, KV heads of each, and features."""


def measure(
    backend: Backend,
    read: ReadRows,
    n_rows: int,
    rank: int,
    dtype: Any,
    *,
    power_iterations: int,
    seed: int,
) -> Spectrum:
    """Find the directions of a prompt's rows, a chunk at a time.

    Args:
        read: Gives the rows.
        n_rows: How many there are.
        rank: Directions to keep.
        dtype: The KV dtype.
        power_iterations: As in :func:`xkv.store.svd.leading_directions`.
        seed: As there.

    Raises:
        InputError: If a row is not finite.
    """
    xp = backend.xp
    gram: Any = 0.0
    summed: Any = 0.0
    total = 0.0
    for start in range(0, n_rows, CHUNK_ROWS):
        layers = read(start, min(start + CHUNK_ROWS, n_rows))
        rows = joined(backend, layers)
        total += energy(backend, rows)
        refuse_overflow(total)
        gram = gram + gram_matrix(backend, rows, dtype)
        summed = summed + xp.sum(rows, axis=1)
        backend.evaluate(gram, summed)
    moving = total - energy(backend, summed) / n_rows
    directions, energies = leading_directions(backend, gram, rank, power_iterations, seed)
    backend.evaluate(directions)
    by_column = backend.to_numpy(xp.sum(energies, axis=0)).astype(np.float64)
    # constant rows have no energy of their own: what rounding leaves of it stands for it
    unit = max(moving, ENERGY_FLOOR * total) or 1.0
    return Spectrum(directions, by_column, unit, (len(layers), *layers[0].shape[2:]))


def plain_basis(backend: Backend, spectrum: Spectrum, dtype: Any) -> Basis:
    """All its directions, basis and latent in the KV dtype: the paper's form."""
    layers = _layers(backend, spectrum, None, dtype)
    return Basis(tuple(map(Packed.plain, layers)))


def packed_bases(
    backend: Backend,
    spectra: Sequence[Spectrum],
    n_rows: int,
    budget_bytes: int,
    dtype: Any,
) -> list[Basis]:
    """Bases of keys and of values in bits that together lose least within one budget.

    Args:
        n_rows: Of the latents.
        budget_bytes: Of latents and bases.

    Raises:
        InputError: If the budget does not hold a band of each in the fewest bits.
    """
    item = backend.xp.zeros((), dtype=dtype).itemsize
    plan = plan_bits([_columns(each, n_rows, item) for each in spectra], budget_bytes)
    if plan is None:
        raise InputError(
            f"{budget_bytes / 1e6:.3f} MB for a group's factors do not hold {BAND} columns of keys "
            "and of values: ask for less compression"
        )
    return [
        _packed_basis(backend, spectrum, chosen, dtype)
        for spectrum, chosen in zip(spectra, plan, strict=True)
    ]


def _columns(spectrum: Spectrum, n_rows: int, item_bytes: int) -> Columns:
    n_layers, n_kv_heads, head_dim = spectrum.heads
    batch = spectrum.directions.shape[0]
    rows = batch * BAND * n_layers * n_kv_heads
    return Columns(
        spectrum.energies / spectrum.unit,
        batch * n_rows,
        item_bytes,
        {
            bits: rows * basis_row_bytes(head_dim, bits, item_bytes)
            for bits in (BASIS_BITS if group_size_of(head_dim) else (16,))
        },
    )


def _packed_basis(
    backend: Backend, spectrum: Spectrum, chosen: Sequence[Option], dtype: Any
) -> Basis:
    """The basis in the bits that were chosen for each band."""
    kept = [(x.latent_bits, x.basis_bits, band) for band, x in enumerate(chosen) if x.latent_bits]
    # bands with the same bits side by side: few arrays for a kernel
    kept.sort(key=lambda x: (-x[0], -x[1], x[2]))
    basis_bits = runs_of(bits for _, bits, _ in kept)
    packed = []
    for layer in _layers(backend, spectrum, len(chosen), None):
        rows = rotate_bands(backend, take_bands(backend, layer, [x[2] for x in kept]), dtype)
        packed.append(
            pack_basis(backend, rows, [BAND * n for n, _ in basis_bits], [b for _, b in basis_bits])
        )
        backend.evaluate(*packed[-1].arrays)
    return Basis(tuple(packed), tuple(bits for bits, _, _ in kept))


def runs_of(bits: Iterable[int]) -> list[tuple[int, int]]:
    """``(how many, which)`` of equal neighbours."""
    return [(len(list(run)), each) for each, run in itertools.groupby(bits)]


def take_bands(backend: Backend, basis: Array, bands: Sequence[int]) -> Array:
    """Some bands of a basis ``[B, r, n_kv_heads, dim]``, in this order."""
    rows = [basis[:, BAND * band : BAND * (band + 1)] for band in bands]
    return backend.xp.concat(rows, axis=1)


def _layers(
    backend: Backend, spectrum: Spectrum, n_bands: int | None, dtype: Any
) -> tuple[Array, ...]:
    """``[B, r, n_kv_heads, dim]`` a layer, arranged in bands, with zeros up to whole ones.

    Args:
        n_bands: That are stored; None for the directions as they are.
    """
    xp = backend.xp
    basis = xp.matrix_transpose(spectrum.directions)
    if n_bands is not None:
        order = backend.from_numpy(np.array(arrange(basis.shape[1], n_bands), np.int32))
        basis = xp.take(basis, order, axis=1)
        shape = (basis.shape[0], -basis.shape[1] % BAND, basis.shape[2])
        zeros = xp.zeros(shape, dtype=basis.dtype, **backend.placement)
        basis = xp.concat([basis, zeros], axis=1)
    basis = basis if dtype is None else xp.astype(basis, dtype)
    return split_layers(backend, basis, *spectrum.heads)
