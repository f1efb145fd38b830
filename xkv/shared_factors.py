"""The keys, or the values, of one group in factored form: they grow by projection on the basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xkv.factorize import factorize

if TYPE_CHECKING:
    from xkv.backend import Array, Backend

ERROR_FLOOR = 0.01
"""A relative error below this is no reason to grow: 16-bit keys are rounded to half of it."""

RESIDUAL_GROWTH = 1.1
"""The basis grows when new rows fit it worse than the first ones did by this factor."""


class SharedFactors(NamedTuple):
    """What a group of W layers shares. Immutable: growing makes new factors, old ones stay valid.

    The rows of ``latent`` use the first of the basis' R rows, so that a basis which has grown does
    not touch them; the rows of ``recent`` use all of them.
    """

    latent: Array
    """``[B, L, r]`` with r at most R."""
    bases: tuple[Array, ...]
    """One per layer, ``[B, R, n_kv_heads, head_dim]``."""
    error: float
    """Relative error of the first rows' fit."""
    recent: Array | None = None
    """``[B, N, R]``: rows folded in later."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactors:
        return self

    @property
    def rank(self) -> int:
        """Rows of the basis."""
        return self.bases[0].shape[1]

    @property
    def arrays(self) -> list[Array]:
        """The latents, without the bases."""
        return [self.latent] if self.recent is None else [self.latent, self.recent]

    def basis(self, layer: int) -> Array:
        """The basis of the group's layer number ``layer`` for the rows of ``latent``."""
        rank = self.latent.shape[-1]
        basis = self.bases[layer]
        return basis if rank == basis.shape[1] else basis[:, :rank]


def factor_rows(
    backend: Backend, layers: Sequence[Array], rank: int, *, power_iterations: int, seed: int
) -> SharedFactors:
    """Factor a prompt's rows, see :func:`xkv.factorize.factorize`.

    Args:
        layers: One array per layer, ``[B, L, n_kv_heads, head_dim]`` in float32 or wider.
        rank: Columns to keep.
    """
    latent, bases, spectrum = factorize(
        backend, layers, rank, power_iterations=power_iterations, seed=seed
    )
    total = sum(_energy(backend, layer) for layer in layers)
    lost = max(total - _energy(backend, spectrum), 0.0)
    return SharedFactors(latent, bases, (lost / total) ** 0.5 if total else 0.0)


def fold_rows(
    backend: Backend,
    factors: SharedFactors,
    layers: Sequence[Array],
    n_recent: int,
    max_rank: int,
    *,
    power_iterations: int,
    seed: int,
) -> SharedFactors:
    """Add later rows by projecting them on the basis, which grows if they fit it badly.

    Args:
        factors: What is there; its rows are kept as they are.
        layers: The new rows of each layer, ``[B, N, n_kv_heads, head_dim]`` in float32 or wider.
        n_recent: Rows of ``factors.recent`` that are still in use.
        max_rank: The basis may grow to this many rows.
    """
    xp = backend.xp
    wide, dtype = layers[0].dtype, factors.latent.dtype
    batch, n_rows, n_kv_heads, head_dim = layers[0].shape
    width = n_kv_heads * head_dim
    parts = [xp.reshape(layer, (batch, n_rows, width)) for layer in layers]
    flat = [
        xp.reshape(xp.astype(basis, wide), (batch, factors.rank, width)) for basis in factors.bases
    ]
    projected = _least_squares(backend, parts, flat)
    rests = [part - projected @ basis for part, basis in zip(parts, flat, strict=True)]
    total, lost = (sum(_energy(backend, x) for x in xs) for xs in (parts, rests))
    allowed = max(factors.error, ERROR_FLOOR) ** 2 * total
    room = min(max_rank - factors.rank, n_rows, len(layers) * width - factors.rank)
    bases = factors.bases
    if room > 0 and lost > RESIDUAL_GROWTH**2 * allowed:
        shaped = [xp.reshape(rest, layers[0].shape) for rest in rests]
        latent, more, spectrum = factorize(
            backend, shaped, room, power_iterations=power_iterations, seed=seed
        )
        kept = backend.to_numpy(xp.sum(spectrum**2, axis=0)).cumsum()
        n_more = min(int((lost - kept > allowed).sum()) + 1, room)
        projected = xp.concat([projected, latent[..., :n_more]], axis=-1)
        bases = tuple(
            xp.concat([basis, xp.astype(grown[:, :n_more], dtype)], axis=1)
            for basis, grown in zip(bases, more, strict=True)
        )
    rows = xp.astype(projected, dtype)
    if factors.recent is not None and n_recent:
        before = _widen(backend, factors.recent[:, :n_recent], rows.shape[-1])
        rows = xp.concat([before, rows], axis=1)
    backend.evaluate(rows, *bases)
    return factors._replace(bases=bases, recent=rows)


def merge_rows(
    backend: Backend, factors: SharedFactors, n_segment: int, n_recent: int, n_moved: int, rank: int
) -> SharedFactors:
    """Move rows from ``recent`` to the end of ``latent``, at one common rank.

    The stacked latents are turned onto their leading directions, as in an incremental SVD.

    Args:
        n_segment: Rows of ``latent`` in use.
        n_recent: Rows of ``recent`` in use.
        n_moved: The first ``n_moved`` of them are moved.
        rank: Columns to keep where the basis has grown.
    """
    xp, old, recent = backend.xp, factors.latent[:, :n_segment], factors.recent
    assert recent is not None
    moved, left = recent[:, :n_moved], recent[:, n_moved:n_recent]
    bases = factors.bases
    rank = min(max(rank, old.shape[-1]), factors.rank)
    if old.shape[-1] == factors.rank:
        latent = xp.concat([old, moved], axis=1)
    else:
        wide = backend.accumulate_dtype(old)
        upper, lower = (xp.astype(_widen(backend, x, factors.rank), wide) for x in (old, moved))
        gram = xp.matrix_transpose(upper) @ upper + xp.matrix_transpose(lower) @ lower
        _, turn = backend.eigh(gram)
        order = xp.arange(factors.rank - 1, factors.rank - 1 - rank, -1, **backend.placement)
        turn = xp.take(turn, order, axis=-1)
        latent = xp.astype(xp.concat([upper @ turn, lower @ turn], axis=1), old.dtype)
        left = xp.astype(xp.astype(left, wide) @ turn, old.dtype)
        bases = tuple(_turn_basis(backend, basis, turn) for basis in bases)
    kept = backend.own(left) if left.shape[1] else None
    backend.evaluate(latent, *bases, *([] if kept is None else [kept]))
    return SharedFactors(latent, bases, factors.error, kept)


def _turn_basis(backend: Backend, basis: Array, turn: Array) -> Array:
    xp = backend.xp
    batch, rank, n_kv_heads, head_dim = basis.shape
    flat = xp.astype(xp.reshape(basis, (batch, rank, n_kv_heads * head_dim)), turn.dtype)
    turned = xp.astype(xp.matrix_transpose(turn) @ flat, basis.dtype)
    return xp.reshape(turned, (batch, -1, n_kv_heads, head_dim))


def _least_squares(backend: Backend, parts: Sequence[Array], bases: Sequence[Array]) -> Array:
    """The latent that fits the rows best; 16-bit rounding leaves bases not quite orthonormal."""
    xp = backend.xp
    product = sum(
        part @ xp.matrix_transpose(basis) for part, basis in zip(parts, bases, strict=True)
    )
    gram = sum(basis @ xp.matrix_transpose(basis) for basis in bases)
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    shift = 4 * float(xp.finfo(gram.dtype).eps)
    while (factor := backend.cholesky(gram + shift * eye)) is None:
        shift *= 10
    inverse = backend.solve_triangular(factor, eye)
    return product @ (xp.matrix_transpose(inverse) @ inverse)


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
