"""Joint factorization of one layer group into a shared latent and a basis per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.store.linear_algebra import triangular_root

OVERSAMPLE_SHARE = 4
"""The iteration carries ``rank // OVERSAMPLE_SHARE`` more columns, at least 8, and drops them."""

DIRECT_WIDTH = 2048
"""Up to this joint width all eigenvectors cost less than an iteration for a third of them."""

DIRECT_SHARE = 3
"""From this share of the joint width on they do."""


class Factors(NamedTuple):
    """A group's keys or values as ``latent @ basis``; see :func:`factorize`."""

    latent: Array
    bases: tuple[Array, ...]
    spectrum: Array


def factorize(
    backend: Backend,
    layers: Sequence[Array],
    rank: int,
    *,
    power_iterations: int = 3,
    seed: int = 0,
) -> Factors:
    """Factor one layer group's keys (or values) into a shared latent.

    The right singular vectors are the eigenvectors of the joint Gram matrix: the rows are read
    twice in all.

    Args:
        layers: One array per layer, ``[..., L, n_kv_heads, head_dim]``, any float dtype. Keys must
            be pre-RoPE. Leading axes are batches, each with factors of its own.
        rank: Columns to keep, 1 to ``len(layers) * n_kv_heads * head_dim``.
        power_iterations: As in :func:`leading_directions`.
        seed: As there.

    Returns:
        latent: ``[..., L, rank]``, columns in order of falling singular value, in the layers'
            dtype.
        bases: One per layer, ``[..., rank, n_kv_heads, head_dim]``. Only the product is defined.
        spectrum: ``[..., rank]`` float32 singular values (float64 for float64 layers).

    Raises:
        InputError: If the rank is out of range, the shapes differ, or a number is not finite.

    Source: xKV, arXiv:2503.18893, section 4.
    """
    xp = backend.xp
    shape = tuple(layers[0].shape)
    if len(shape) < 3 or any(tuple(layer.shape) != shape for layer in layers):
        raise InputError(
            "layers must share one shape [..., L, n_kv_heads, head_dim], got "
            + ", ".join(str(tuple(layer.shape)) for layer in layers)
        )
    *batch, n_tokens, n_kv_heads, head_dim = shape
    layer_width = n_kv_heads * head_dim
    width = len(layers) * layer_width
    if not 1 <= rank <= width:
        raise InputError(
            f"rank={rank} is not in 1 to the joint width {width} "
            f"({len(layers)} layers x {n_kv_heads} kv heads x {head_dim}); lower the rank"
        )
    dtype = backend.accumulate_dtype(layers[0])
    rows = xp.concat(
        [xp.reshape(xp.astype(x, dtype), (*batch, n_tokens, layer_width)) for x in layers], axis=-1
    )
    gram = gram_matrix(backend, rows, layers[0].dtype)
    right, energies = leading_directions(backend, gram, rank, power_iterations, seed)
    latent = xp.astype(rows @ right, layers[0].dtype)
    basis = xp.astype(xp.matrix_transpose(right), layers[0].dtype)
    backend.evaluate(latent, basis)
    bases = split_layers(backend, basis, len(layers), n_kv_heads, head_dim)
    return Factors(latent, bases, xp.sqrt(energies))


def gram_matrix(backend: Backend, rows: Array, dtype: Any) -> Array:
    """``rows^T rows`` of ``[..., L, width]`` in float32 or wider.

    Args:
        dtype: Of the numbers that the rows were made from: a device that multiplies it with sums in
            float32 does so.
    """
    xp = backend.xp
    narrow = backend.product_dtype(dtype)
    if narrow is None:
        return xp.matrix_transpose(rows) @ rows
    rows = xp.astype(rows, narrow)
    return backend.wide_product(xp.matrix_transpose(rows), rows)


def leading_directions(
    backend: Backend, gram: Array, rank: int, power_iterations: int = 3, seed: int = 0
) -> tuple[Array, Array]:
    """The leading eigenvectors of a Gram matrix, as columns.

    All of them at once, or by randomized subspace iteration where the rank is far below the width
    of a large matrix: then only matrices of about ``rank x rank`` go into LAPACK's routines.

    Args:
        gram: ``[..., width, width]``, float32 or wider.
        rank: Columns to keep.
        power_iterations: More of them bring the error closer to the optimal truncation.
        seed: The random start is drawn by numpy, so it is the same on every backend.

    Returns:
        ``[..., width, rank]`` orthonormal, and the eigenvalues ``[..., rank]``, both by falling
        eigenvalue.

    Raises:
        InputError: If a number is not finite.

    Source: shifted Cholesky QR, arXiv:1809.11085.
    """
    xp = backend.xp
    if not bool(xp.all(xp.isfinite(gram))):
        raise InputError("the rows hold NaN or infinity, which cannot be factored")
    width, n_columns, right = gram.shape[-1], iteration_columns(rank, gram.shape[-1]), None
    if n_columns < width:
        start = xp.astype(backend.normal((width, n_columns), seed), gram.dtype)
        right = xp.broadcast_to(start, (*gram.shape[:-2], width, n_columns))
        for _ in range(power_iterations + 1):
            right = _orthonormalize(backend, gram @ right)
            backend.evaluate(right)
        gram = xp.matrix_transpose(right) @ (gram @ right)
    eigenvalues, turn = backend.eigh(gram)
    order = xp.arange(n_columns - 1, n_columns - 1 - rank, -1, **backend.placement)
    turn = xp.take(turn, order, axis=-1)
    energies = xp.clip(xp.take(eigenvalues, order, axis=-1), 0, None)
    return turn if right is None else right @ turn, energies


def iteration_columns(rank: int, width: int) -> int:
    """Columns that the subspace iteration carries; all of ``width`` where it is not needed."""
    n_columns = rank + max(8, rank // OVERSAMPLE_SHARE)
    if n_columns > width // (DIRECT_SHARE if width <= DIRECT_WIDTH else 1):
        return width
    return n_columns


def split_layers(
    backend: Backend, basis: Array, n_layers: int, n_kv_heads: int, head_dim: int
) -> tuple[Array, ...]:
    """A joint basis ``[..., r, width]`` as one ``[..., r, n_kv_heads, head_dim]`` a layer."""
    width = n_kv_heads * head_dim
    return tuple(
        backend.own(
            backend.xp.reshape(
                basis[..., i * width : (i + 1) * width], (*basis.shape[:-1], n_kv_heads, head_dim)
            )
        )
        for i in range(n_layers)
    )


def _orthonormalize(backend: Backend, x: Array) -> Array:
    """Orthonormal columns with the span of ``x``, by three passes of shifted Cholesky QR."""
    for _ in range(3):
        root = triangular_root(backend, backend.xp.matrix_transpose(x) @ x)
        x = x @ backend.xp.matrix_transpose(root)
    return x
