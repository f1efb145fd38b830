"""Which bits each band of a group's factors gets, so that every byte removes the most error."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.packed import group_size_of
from xkv.ops.types import Array
from xkv.store.codec import BASIS_GROUP, BITS, basis_row_bytes, pack_part, row_bytes

SAMPLE_ROWS = 1024
"""Tokens, at most, on which the error of each number of bits is measured."""


class Option(NamedTuple):
    """One way to store a band; with 0 bits it is left out."""

    n_bytes: int
    error: float
    """Energy that is lost, as a share of the tensor's."""
    latent_bits: int
    basis_bits: int


def band_options(
    backend: Backend, latent: Array, bases: Sequence[Array], energy: float, n_needed: int
) -> list[list[Option]]:
    """Measure what each band costs, and loses, in every number of bits.

    Args:
        latent: ``[B, L, r]`` in the KV dtype, r a multiple of ``BAND``.
        bases: One a layer, ``[B, r, n_kv_heads, dim]``.
        energy: What errors are shares of.
        n_needed: This many bands, the first ones, cannot be left out.

    Returns:
        The options of each band, in no order.
    """
    xp = backend.xp
    batch, n_rows, _ = latent.shape
    step = -(-n_rows // SAMPLE_ROWS)
    sample = latent[:, ::step]
    scale = n_rows / sample.shape[1]
    wide = xp.astype(sample, backend.accumulate_dtype(latent))
    column_energy = xp.sum(wide * wide, axis=(0, 1)) * scale

    def in_latent(squares: Array) -> Array:
        return xp.sum(squares, axis=(0, 1)) * scale

    def in_basis(squares: Array) -> Array:
        # the latent's columns are nearly orthogonal, so that errors of basis rows add up
        return xp.sum(squares, axis=(0, 2, 3)) / batch * column_energy

    can_pack_basis = all(group_size_of(basis.shape[-1]) for basis in bases)
    basis_bits = BITS if can_pack_basis else (16,)
    whole = _by_band(backend, column_energy)
    exact = [0.0] * len(whole)
    latent_errors = [*_errors(backend, [sample], BITS[:-1], BAND, in_latent), exact]
    basis_errors = [*_errors(backend, bases, basis_bits[:-1], BASIS_GROUP, in_basis), exact]
    item = latent.itemsize
    rows = [(basis.shape[2], basis.shape[3]) for basis in bases]
    latent_bytes = [batch * n_rows * row_bytes(BAND, bits, item) for bits in BITS]
    basis_bytes = [
        batch * BAND * sum(n * basis_row_bytes(dim, bits, item) for n, dim in rows)
        for bits in basis_bits
    ]
    return [
        ([] if band < n_needed else [Option(0, whole[band] / energy, 0, 0)])
        + [
            Option(
                latent_bytes[i] + basis_bytes[j],
                (latent_errors[i][band] + basis_errors[j][band]) / energy,
                latent_bits,
                bits,
            )
            for i, latent_bits in enumerate(BITS)
            for j, bits in enumerate(basis_bits)
        ]
        for band in range(len(whole))
    ]


def _errors(
    backend: Backend,
    matrices: Sequence[Array],
    all_bits: Sequence[int],
    largest_group: int,
    summed: Callable[[Array], Array],
) -> list[list[float]]:
    """Squared errors of each number of bits below 16, summed by band."""
    xp, found = backend.xp, []
    for bits in all_bits:
        total = 0.0
        for matrix in matrices:
            wide = backend.accumulate_dtype(matrix)
            packed = pack_part(backend, matrix, bits, largest_group).unpack(backend)
            total = total + summed((xp.astype(packed, wide) - xp.astype(matrix, wide)) ** 2)
            backend.evaluate(total)
        found.append(_by_band(backend, total))
    return found


def _by_band(backend: Backend, columns: Array) -> list[float]:
    return backend.to_numpy(columns).astype(np.float64).reshape(-1, BAND).sum(-1).tolist()


def smallest_bytes(bands: Sequence[Sequence[Option]]) -> int:
    """Bytes of the cheapest plan."""
    return sum(min(option.n_bytes for option in options) for options in bands)


def choose(bands: Sequence[Sequence[Option]], budget_bytes: int) -> list[Option]:
    """The option of each band, together within a budget, that lose least.

    Greedy along each band's lower convex hull, by error removed per byte; what is left then goes to
    the single changes that remove most and still fit.

    Args:
        bands: Options of all bands that share the budget.
        budget_bytes: At least :func:`smallest_bytes`.
    """
    hulls = [_hull(options) for options in bands]
    chosen = [0] * len(hulls)
    left = budget_bytes - sum(hull[0].n_bytes for hull in hulls)
    queue = [_step(hull, 0, band) for band, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, band, n_bytes = heapq.heappop(queue)
        if n_bytes > left:
            continue
        left -= n_bytes
        chosen[band] += 1
        if chosen[band] + 1 < len(hulls[band]):
            heapq.heappush(queue, _step(hulls[band], chosen[band], band))
    options = [hull[i] for hull, i in zip(hulls, chosen, strict=True)]
    while change := _best_change(bands, options, left):
        band, option = change
        left -= option.n_bytes - options[band].n_bytes
        options[band] = option
    return options


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mixture of others beats, by rising bytes and falling error."""
    hull: list[Option] = []
    for option in sorted(options):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(low: Option, high: Option) -> float:
    """Error removed per byte."""
    return (low.error - high.error) / (high.n_bytes - low.n_bytes)


def _step(hull: Sequence[Option], at: int, band: int) -> tuple[float, int, int]:
    low, high = hull[at], hull[at + 1]
    return -_gain(low, high), band, high.n_bytes - low.n_bytes


def _best_change(
    bands: Sequence[Sequence[Option]], chosen: Sequence[Option], left: int
) -> tuple[int, Option] | None:
    """The change of one band that fits into ``left`` more bytes and removes most error."""
    best, found = 0.0, None
    for band, (options, now) in enumerate(zip(bands, chosen, strict=True)):
        for option in options:
            if option.n_bytes - now.n_bytes <= left and now.error - option.error > best:
                best, found = now.error - option.error, (band, option)
    return found
