"""Which bits each band of columns gets, so that every byte removes the most error."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from xkv.config import BAND
from xkv.store.codec import BITS, ROUNDING, row_bytes

N_ROUNDS = 5
"""Times that directions are arranged for the bands which the round before kept."""


class Option(NamedTuple):
    """One way to store a band; with 0 bits it is left out."""

    n_bytes: int
    error: float
    """What is lost, in the unit of the energies."""
    latent_bits: int
    basis_bits: int


class Columns(NamedTuple):
    """The keys, or the values, of one group, for a plan."""

    energies: np.ndarray
    """Of the rows along each direction, falling, in a unit that all tensors of a plan share."""
    n_rows: int
    """Of the latent, of all sequences."""
    item_bytes: int
    """Of a number in the KV dtype."""
    basis_bytes: Mapping[int, int] = MappingProxyType({16: 0})
    """Of a band of a prompt's own basis, by its bits; the model's costs a prompt nothing."""
    max_bands: int | None = None


def arrange(n_columns: int, n_bands: int) -> list[int]:
    """The order of directions by falling energy when ``n_bands`` bands of them are stored.

    The first direction of a band becomes the mean of its rotated columns, which a row's bias holds
    in 16 bits for nothing: so the strongest of all come first in a band each.
    """
    first, rest = range(min(n_bands, n_columns)), range(min(n_bands, n_columns), n_columns)
    order: list[int] = []
    for i in first:
        order += [i, *rest[(BAND - 1) * i : (BAND - 1) * (i + 1)]]
    return [*order, *rest[(BAND - 1) * n_bands :]]


def plan_bits(tensors: Sequence[Columns], budget_bytes: float) -> list[list[Option]] | None:
    """The options of each tensor's bands, :func:`arrange`-d in as many as there are options.

    Args:
        tensors: Those that share the budget.
        budget_bytes: Of latents and bases.

    Returns:
        None if the budget does not hold a band of each tensor.
    """
    counts, best, least = [0] * len(tensors), None, np.inf
    for spare in (*[1] * N_ROUNDS, 0):
        tables, lost = [], 0.0
        for tensor, n_bands in zip(tensors, counts, strict=True):
            table, left_out = _options(tensor, n_bands, n_bands + spare)
            tables.append(table)
            lost += left_out
        together = [options for table in tables for options in table]
        if sum(min(option.n_bytes for option in options) for options in together) > budget_bytes:
            break
        chosen = choose(together, int(budget_bytes))
        lost += sum(option.error for option in chosen)
        options = iter(chosen)
        found = [list(itertools.islice(options, len(table))) for table in tables]
        kept = [max(i + 1 for i, x in enumerate(each) if x.latent_bits) for each in found]
        is_arranged = all(0 < k <= n for k, n in zip(kept, counts, strict=True))
        if is_arranged and lost < least:
            least, best = lost, [each[:n] for each, n in zip(found, counts, strict=True)]
        if kept == counts:
            break
        counts = kept
    return best


def lost_energy(energies: np.ndarray, bits: Sequence[int]) -> float:
    """What a plan's bits of each band lose of a tensor's energies."""
    options, left_out = _options(Columns(energies, 1, 2), len(bits), len(bits))
    chosen = (
        next(option.error for option in band if option.latent_bits == n)
        for band, n in zip(options, bits, strict=True)
    )
    return left_out + sum(chosen)


def _options(tensor: Columns, n_bands: int, n_shown: int) -> tuple[list[list[Option]], float]:
    """What each band costs, and loses, in every number of bits.

    What rounding loses is a share of the energy that depends on the bits alone, as a rotated band's
    numbers are nearly normal; but its mean is exact.

    Args:
        n_bands: The directions are arranged for so many; 0 leaves them as they are.
        n_shown: Of the first bands; all, where they are not arranged.

    Returns:
        Options by band, and what bands that are not shown lose.
    """
    order = arrange(len(tensor.energies), n_bands)
    by_band = np.pad(tensor.energies[order], (0, -len(order) % BAND)).reshape(-1, BAND)
    limit = min(n_shown if n_bands else len(by_band), tensor.max_bands or len(by_band))
    whole, spread = by_band.sum(1).tolist(), by_band[:, 1:].sum(1).tolist()
    options = [
        ([Option(0, whole[band], 0, 0)] if band else [])
        + [
            Option(
                tensor.n_rows * row_bytes(BAND, bits, tensor.item_bytes) + n_basis,
                ROUNDING[bits] * spread[band] + ROUNDING[basis_bits] * whole[band],
                bits,
                basis_bits,
            )
            for bits in BITS
            for basis_bits, n_basis in tensor.basis_bytes.items()
        ]
        for band in range(min(limit, len(by_band)))
    ]
    return options, sum(whole[len(options) :])


def choose(bands: Sequence[Sequence[Option]], budget_bytes: int) -> list[Option]:
    """The option of each band, together within a budget, that lose least.

    Greedy along each band's lower convex hull, by error removed per byte; what is left then goes to
    the single changes that remove most and still fit.

    Args:
        bands: Options of all bands that share the budget.
        budget_bytes: At least that of each band's cheapest option.
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
