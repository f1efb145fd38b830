"""The keys, or the values, of one group in factored form: they grow by projection on the basis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xkv.bit_plan import Option, band_options, choose, smallest_bytes
from xkv.codec import (
    BAND,
    Packed,
    pack_basis,
    pack_latent,
    pack_part,
    rotate_bands,
    row_bytes,
)
from xkv.errors import InputError
from xkv.factorize import factorize

if TYPE_CHECKING:
    from xkv.backend import Array, Backend

ERROR_FLOOR = 0.01
"""A relative error below this is no reason to grow: 16-bit keys are rounded to half of it."""

ENERGY_FLOOR = 1e-6
"""Rows whose moving share is below this are constant but for rounding."""

FIT_RIDGE = 1e-5
"""Columns this near to dependent are not corrected along what they hardly have."""

FITTED_ROWS = 4096
"""Tokens that are widened at once when bases are fitted to a stored latent."""

GROWTH_BITS = 8
"""Bits of columns that are added to quantized factors."""

GROWTH_STEP = 32
"""Such columns come in whole groups of MLX's layout."""

RESIDUAL_GROWTH = 1.1
"""The basis grows when new rows fit it worse than the first ones did by this factor."""


class SharedFactors(NamedTuple):
    """What a group of W layers shares. Immutable: growing makes new factors, old ones stay valid.

    The rows of ``latent`` use the first parts of the bases, so that a basis which has grown does
    not touch them; the rows of ``recent`` use all of them.
    """

    latent: Packed
    """``[B, L, r]`` with r at most R."""
    bases: tuple[Packed, ...]
    """One per layer, ``[B, R, n_kv_heads, head_dim]``."""
    error: float
    """Relative error of the first rows' fit."""
    recent: Packed | None = None
    """``[B, N, R]``: rows folded in later."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactors:
        return self

    @property
    def rank(self) -> int:
        """Rows of the basis."""
        return self.bases[0].rank

    @property
    def has_grown(self) -> bool:
        """Whether the basis has rows that ``latent`` does not use."""
        return self.rank > self.latent.rank

    @property
    def arrays(self) -> list[Array]:
        """The latents, without the bases."""
        return self.latent.arrays + ([] if self.recent is None else self.recent.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of latents and bases."""
        bases = sum(basis.nbytes for basis in self.bases)
        return bases + sum(x.nbytes for x in self.arrays)

    @property
    def growth_bits(self) -> int:
        """Of the columns that are added when the basis grows."""
        return 16 if set(self.latent.bits) == {16} else GROWTH_BITS

    def nbytes_with(self, n_recent: int) -> int:
        """Bytes of latents and bases once ``recent`` has so many rows, without growth."""
        latent, bases = self.latent, sum(basis.nbytes for basis in self.bases)
        added = self.bases[0].rank - latent.rank
        row = latent.nbytes / latent.shape[1] + added * self._column_bits / 8
        return bases + latent.nbytes + int(n_recent * row)

    def column_bytes(self, n_recent: int) -> int:
        """Bytes of one more row of the bases and its column of ``recent``."""
        width = sum(math.prod(basis.shape[2:]) for basis in self.bases)
        return int((n_recent + width) * self._column_bits / 8)

    @property
    def _column_bits(self) -> float:
        """Bits of a number in a column that is added."""
        n_bytes = row_bytes(GROWTH_STEP, self.growth_bits, self.latent.item_bytes)
        return 8 * n_bytes / GROWTH_STEP

    def basis(self, layer: int) -> Packed:
        """The basis of the group's layer number ``layer`` for the rows of ``latent``."""
        return self.bases[layer].leading(self.latent.rank)

    def parts(self) -> list[tuple[int, int, int]]:
        """``(columns, bits of the latent, bits of the bases)`` of each run of columns."""
        columns = (
            itertools.chain.from_iterable(map(itertools.repeat, x.bits, x.widths))
            for x in (self.latent, self.basis(0))
        )
        runs = itertools.groupby(zip(*columns, strict=True))
        return [(len(list(run)), *bits) for bits, run in runs]


class Draft(NamedTuple):
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
        """:func:`xkv.bit_plan.band_options`"""
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
            rows = _turn_basis(backend, _take_bands(backend, basis, kept, 1), turn)
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
) -> Draft:
    """Factor a prompt's rows, see :func:`xkv.factorize.factorize`.

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
    total = sum(_energy(backend, layer) for layer in layers)
    if not math.isfinite(total):
        raise InputError(
            "the cache holds NaN or infinity, which cannot be factored: the model's activations "
            "overflow; run it with the full cache, or in bfloat16"
        )
    means = [xp.mean(layer, axis=1, keepdims=True) for layer in layers]
    n_rows = layers[0].shape[1]
    moving = total - n_rows * sum(_energy(backend, mean) for mean in means)
    latent, bases, spectrum = factorize(
        backend,
        layers,
        rank,
        power_iterations=power_iterations,
        seed=seed,
        # weights may take numbers out of 16 bits' range
        product_dtype=backend.product_dtype(dtype) if weights is None else None,
    )
    lost = max(total - _energy(backend, spectrum), 0.0)
    if weights is not None:
        bases = tuple(basis / w for basis, w in zip(bases, weights, strict=True))
    if is_rotated:
        latent, bases = rotate_bands(backend, latent, bases, dtype)
    else:
        latent, bases = xp.astype(latent, dtype), tuple(xp.astype(x, dtype) for x in bases)
    backend.evaluate(latent, *bases)
    kept = None if weights is None else tuple(weights)
    return Draft(latent, bases, total, lost, moving, kept)


def pack_together(
    backend: Backend, drafts: Sequence[Draft], budget_bytes: int, min_rank: int
) -> list[SharedFactors]:
    """Store keys and values of a group within one budget, where together they lose least.

    Raises:
        InputError: If the budget does not hold ``min_rank`` columns of each in the fewest bits.
    """
    bands = [draft.options(backend, -(-min_rank // BAND)) for draft in drafts]
    together = [options for each in bands for options in each]
    if (needed := smallest_bytes(together)) > budget_bytes:
        raise InputError(
            f"{budget_bytes / 1e6:.3f} MB for a group's factors do not hold {min_rank} columns "
            f"each, which take {needed / 1e6:.3f} MB: ask for less compression, or a lower min_rank"
        )
    chosen = choose(together, budget_bytes)
    packed = []
    for draft, each in zip(drafts, bands, strict=True):
        packed.append(draft.pack(backend, chosen[: len(each)]))
        chosen = chosen[len(each) :]
    return packed


def fold_rows(
    backend: Backend,
    factors: SharedFactors,
    layers: Sequence[Array],
    n_recent: int,
    max_growth: int,
    *,
    power_iterations: int,
    seed: int,
) -> SharedFactors:
    """Add later rows by projecting them on the basis, which grows if they fit it badly.

    Args:
        factors: What is there; its rows are kept as they are.
        layers: The new rows of each layer, ``[B, N, n_kv_heads, head_dim]`` in float32 or wider.
        n_recent: Rows of ``factors.recent`` that are still in use.
        max_growth: The basis may grow by this many rows.
    """
    xp = backend.xp
    wide, dtype = layers[0].dtype, factors.latent.dtype
    batch, n_rows, n_kv_heads, head_dim = layers[0].shape
    width = n_kv_heads * head_dim
    parts = [xp.reshape(layer, (batch, n_rows, width)) for layer in layers]
    flat = [
        xp.reshape(xp.astype(basis.unpack(backend), wide), (batch, factors.rank, width))
        for basis in factors.bases
    ]
    projected = _least_squares(backend, parts, flat)
    rests = [part - projected @ basis for part, basis in zip(parts, flat, strict=True)]
    total, lost = (sum(_energy(backend, x) for x in xs) for xs in (parts, rests))
    allowed = max(factors.error, ERROR_FLOOR) ** 2 * total
    bits = factors.growth_bits
    room = min(max_growth, n_rows, len(layers) * width - factors.rank)
    bases = factors.bases
    if room > 0 and lost > RESIDUAL_GROWTH**2 * allowed:
        shaped = [xp.reshape(rest, layers[0].shape) for rest in rests]
        latent, more, spectrum = factorize(
            backend, shaped, room, power_iterations=power_iterations, seed=seed
        )
        kept = backend.to_numpy(xp.sum(spectrum**2, axis=0)).cumsum()
        n_more = min(int((lost - kept > allowed).sum()) + 1, room)
        step = 1 if bits == 16 else GROWTH_STEP
        n_more = min(-(-n_more // step) * step, room // step * step)
        if n_more:
            projected = xp.concat([projected, latent[..., :n_more]], axis=-1)
            bases = tuple(
                Packed(
                    (*basis.parts, pack_part(backend, xp.astype(rows[:, :n_more], dtype), bits)), 1
                )
                for basis, rows in zip(bases, more, strict=True)
            )
    added_widths = bases[0].widths[len(factors.basis(0).parts) :]
    widths = factors.latent.widths + added_widths
    row_bits = factors.latent.bits + (bits,) * len(added_widths)
    rows = pack_latent(backend, xp.astype(projected, dtype), widths, row_bits)
    if factors.recent is not None and n_recent:
        before = factors.recent.rows(0, n_recent)
        new = widths[len(before.parts) :]
        if new:
            zeros = xp.zeros((batch, n_recent, sum(new)), dtype=dtype, **backend.placement)
            added = pack_latent(backend, zeros, new, (bits,) * len(new))
            before = Packed((*before.parts, *added.parts), 2)
        rows = before.followed_by(backend, rows)
    backend.evaluate(*rows.arrays, *(x for basis in bases for x in basis.arrays))
    return factors._replace(bases=bases, recent=rows)


def merge_rows(
    backend: Backend, factors: SharedFactors, n_segment: int, n_recent: int, n_moved: int
) -> SharedFactors:
    """Move rows from ``recent`` to the end of ``latent``, at one common rank.

    Where the basis has grown, the stacked latents are turned onto their leading directions, as in
    an incremental SVD, and packed again into as many bytes as they take.

    Args:
        n_segment: Rows of ``latent`` in use.
        n_recent: Rows of ``recent`` in use.
        n_moved: The first ``n_moved`` of them are moved.
    """
    old, recent = factors.latent.rows(0, n_segment), factors.recent
    assert recent is not None
    moved, left = recent.rows(0, n_moved), recent.rows(n_moved, n_recent)
    if not factors.has_grown:
        latent = old.followed_by(backend, moved)
        kept = left.own(backend) if left.shape[1] else None
        backend.evaluate(*latent.arrays, *([] if kept is None else kept.arrays))
        return factors._replace(latent=latent, recent=kept)
    return _turn(backend, factors, old, moved, left)


def _turn(
    backend: Backend,
    factors: SharedFactors,
    old: Packed,
    moved: Packed,
    left: Packed,
) -> SharedFactors:
    """:func:`merge_rows` where the basis has grown."""
    xp, dtype = backend.xp, factors.latent.dtype
    rows = [x.unpack(backend) for x in (old, moved, left)]
    wide = backend.accumulate_dtype(rows[0])
    upper, lower, rest = (xp.astype(_widen(backend, x, factors.rank), wide) for x in rows)
    gram = xp.matrix_transpose(upper) @ upper + xp.matrix_transpose(lower) @ lower
    _, turn = backend.eigh(gram)
    is_plain = factors.growth_bits == 16
    rank = factors.rank
    if is_plain:
        # as many columns for all rows as take the bytes that the factors have now
        n_rows = sum(x.shape[1] for x in rows)
        width = sum(math.prod(basis.shape[2:]) for basis in factors.bases)
        fitting = factors.nbytes // (
            factors.latent.item_bytes * rows[0].shape[0] * (n_rows + width)
        )
        rank = min(max(fitting, old.rank), rank)
    order = xp.arange(factors.rank - 1, factors.rank - 1 - rank, -1, **backend.placement)
    turn = xp.take(turn, order, axis=-1)
    latent = xp.concat([x @ turn for x in (upper, lower, rest)], axis=1)
    bases = tuple(_turn_basis(backend, basis.unpack(backend), turn) for basis in factors.bases)
    if is_plain:
        latent, bases = xp.astype(latent, dtype), tuple(xp.astype(x, dtype) for x in bases)
    else:
        latent, bases = rotate_bands(backend, latent, bases, dtype)
    backend.evaluate(latent, *bases)
    total = _energy(backend, xp.astype(latent, wide))
    draft = Draft(latent, bases, total, factors.error**2 * total, total)
    if is_plain:
        merged = draft.plain()
    else:
        merged = draft.pack(backend, choose(draft.options(backend, 1), factors.nbytes))
    n_rows = old.shape[1] + moved.shape[1]
    recent = merged.latent.rows(n_rows, latent.shape[1]).own(backend)
    latent = merged.latent.rows(0, n_rows).own(backend)
    backend.evaluate(*latent.arrays, *recent.arrays)
    return merged._replace(latent=latent, recent=recent if recent.shape[1] else None)


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
    gram = product = None
    for start in range(0, n_rows, FITTED_ROWS):
        end = min(start + FITTED_ROWS, n_rows)
        before = xp.concat([xp.astype(x[:, start:end], wide) for x in columns], axis=-1)
        after = xp.astype(stored.rows(start, end).unpack(backend), wide)
        turned = xp.matrix_transpose(after)
        added = turned @ after, turned @ (before - after)
        gram, product = added if gram is None else (gram + added[0], product + added[1])
        backend.evaluate(gram, product)
    eye = xp.eye(stored.rank, dtype=wide, **backend.placement)
    # columns of one length, so that what keeps the matrix regular costs weak ones no precision
    size = xp.sqrt(xp.sum(gram * eye, axis=-1))
    size = xp.where(size > 0, size, xp.ones_like(size))
    inverse = _inverse(backend, gram / (size[..., None] * size[..., None, :]) + FIT_RIDGE * eye)
    correction = xp.matrix_transpose(product / size[..., None]) @ inverse / size[..., None, :]
    return correction + eye


def _turn_basis(backend: Backend, basis: Array, turn: Array) -> Array:
    xp = backend.xp
    batch, rank, n_kv_heads, head_dim = basis.shape
    flat = xp.reshape(xp.astype(basis, turn.dtype), (batch, rank, n_kv_heads * head_dim))
    turned = xp.matrix_transpose(turn) @ flat
    return xp.reshape(turned, (batch, -1, n_kv_heads, head_dim))


def _least_squares(backend: Backend, parts: Sequence[Array], bases: Sequence[Array]) -> Array:
    """The latent that fits the rows best; 16-bit rounding leaves bases not quite orthonormal."""
    xp = backend.xp
    product = sum(
        part @ xp.matrix_transpose(basis) for part, basis in zip(parts, bases, strict=True)
    )
    gram = sum(basis @ xp.matrix_transpose(basis) for basis in bases)
    return product @ _inverse(backend, gram)


def _inverse(backend: Backend, gram: Array) -> Array:
    """Of a positive semidefinite matrix; where it is singular, of one a little larger."""
    xp = backend.xp
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    mean_diagonal = float(xp.sum(gram * eye)) / (gram.shape[0] * gram.shape[-1])
    shift = 4 * float(xp.finfo(gram.dtype).eps) * mean_diagonal
    while (factor := backend.cholesky(gram + shift * eye)) is None:
        shift *= 10
    inverse = backend.solve_triangular(factor, eye)
    return xp.matrix_transpose(inverse) @ inverse


def _widen(backend: Backend, rows: Array, rank: int) -> Array:
    """Rows of a latent with zeros for the basis rows they do not use."""
    missing = rank - rows.shape[-1]
    if not missing:
        return rows
    xp = backend.xp
    zeros = xp.zeros((*rows.shape[:-1], missing), dtype=rows.dtype, **backend.placement)
    return xp.concat([rows, zeros], axis=-1)


def _energy(backend: Backend, x: Array) -> float:
    return float(backend.xp.sum(x * x))
