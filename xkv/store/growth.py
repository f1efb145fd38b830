"""Later rows in a group's factors: projected on the basis, which grows where they fit it badly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.types import Array
from xkv.store.bit_plan import choose
from xkv.store.codec import BASIS_GROUP, pack_latent, pack_part
from xkv.store.factorization import Factorization, refuse_overflow, turn_basis
from xkv.store.factors import GROWTH_STEP, SharedFactors
from xkv.store.linear_algebra import energy, inverse
from xkv.store.rotation import rotate_bands
from xkv.store.svd import factorize

ERROR_FLOOR = 0.01
"""A relative error below this is no reason to grow: 16-bit keys are rounded to half of it."""

WEAK_DIRECTION = 0.05
"""Of a packed basis, see :func:`_least_squares`."""

RESIDUAL_GROWTH = 1.1
"""The basis grows when new rows fit it worse than the first ones did by this factor."""


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
    projected = _least_squares(backend, parts, flat, 0.0 if factors.is_plain else WEAK_DIRECTION)
    rests = [part - projected @ basis for part, basis in zip(parts, flat, strict=True)]
    total, lost = (sum(energy(backend, x) for x in xs) for xs in (parts, rests))
    refuse_overflow(total)
    allowed = max(factors.error, ERROR_FLOOR) ** 2 * total
    bits = factors.growth_bits
    # packed bases are filled up to whole bands, and may be full without being complete
    full_rank = len(layers) * width - (factors.rank if factors.is_plain else 0)
    room = min(max_growth, n_rows, full_rank)
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
            new_rows = (xp.astype(basis[:, :n_more], dtype) for basis in more)
            bases = tuple(
                Packed((*basis.parts, pack_part(backend, rows, bits, BASIS_GROUP)), 1)
                for basis, rows in zip(bases, new_rows, strict=True)
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
    is_plain = factors.is_plain
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
    bases = tuple(turn_basis(backend, basis.unpack(backend), turn) for basis in factors.bases)
    if is_plain:
        latent, bases = xp.astype(latent, dtype), tuple(xp.astype(x, dtype) for x in bases)
    else:
        latent, bases = rotate_bands(backend, latent, bases, dtype)
    backend.evaluate(latent, *bases)
    total = energy(backend, xp.astype(latent, wide))
    factored = Factorization(latent, bases, total, factors.error**2 * total, total)
    if is_plain:
        merged = factored.plain()
    else:
        merged = factored.pack(backend, choose(factored.options(backend, 1), factors.nbytes))
    n_rows = old.shape[1] + moved.shape[1]
    recent = merged.latent.rows(n_rows, latent.shape[1]).own(backend)
    latent = merged.latent.rows(0, n_rows).own(backend)
    backend.evaluate(*latent.arrays, *recent.arrays)
    return merged._replace(latent=latent, recent=recent if recent.shape[1] else None)


def _least_squares(
    backend: Backend, parts: Sequence[Array], bases: Sequence[Array], weak: float
) -> Array:
    """The latent that fits the rows best; rounding leaves bases not quite orthonormal.

    Args:
        weak: Directions in which the bases have less than this share of the mean are left out as
            far as they are weaker: they are rounding, and the large numbers that they would take
            set the scale by which all others of a row are rounded.
    """
    xp = backend.xp
    product = sum(
        part @ xp.matrix_transpose(basis) for part, basis in zip(parts, bases, strict=True)
    )
    gram = sum(basis @ xp.matrix_transpose(basis) for basis in bases)
    if not weak:
        return product @ inverse(backend, gram)
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    mean = xp.sum(gram * eye, axis=(-2, -1), keepdims=True) / gram.shape[-1]
    return product @ gram @ inverse(backend, gram @ gram + (weak * mean) ** 2 * eye)


def _widen(backend: Backend, rows: Array, rank: int) -> Array:
    """Rows of a latent with zeros for the basis rows they do not use."""
    missing = rank - rows.shape[-1]
    if not missing:
        return rows
    xp = backend.xp
    zeros = xp.zeros((*rows.shape[:-1], missing), dtype=rows.dtype, **backend.placement)
    return xp.concat([rows, zeros], axis=-1)
