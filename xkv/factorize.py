"""Joint factorization of one layer group into a shared latent and a basis per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from xkv.errors import InputError

if TYPE_CHECKING:
    from xkv.backend import Array, Backend

OVERSAMPLE_SHARE = 4
"""The iteration carries ``rank // OVERSAMPLE_SHARE`` more columns, at least 8, and drops them."""


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

    Randomized subspace iteration: tall products on the accelerator, and only matrices of about
    ``rank x rank`` in the Cholesky and eigenvalue routines. No matrix wider than one layer is
    built.

    Args:
        layers: One array per layer, ``[..., L, n_kv_heads, head_dim]``, any float dtype. Keys must
            be pre-RoPE. Leading axes are batches, each with factors of its own.
        rank: Columns to keep, 1 to ``len(layers) * n_kv_heads * head_dim``.
        power_iterations: More of them bring the error closer to the optimal truncation.
        seed: The random start is drawn by numpy, so it is the same on every backend.

    Returns:
        latent: ``[..., L, rank]``, columns in order of falling singular value, in the layers'
            dtype.
        bases: One per layer, ``[..., rank, n_kv_heads, head_dim]``. Only the product is defined.
        spectrum: ``[..., rank]`` float32 singular values (float64 for float64 layers).

    Raises:
        InputError: If the rank is out of range or the shapes differ.

    Source: xKV, arXiv:2503.18893, section 4; shifted Cholesky QR, arXiv:1809.11085.
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
    parts = [
        xp.astype(xp.reshape(layer, (*batch, n_tokens, layer_width)), dtype) for layer in layers
    ]

    def times(right: Array) -> Array:
        """[X_1 ... X_W] @ right, without joining the layers."""
        product = parts[0] @ right[..., :layer_width, :]
        for i, part in enumerate(parts[1:], start=1):
            product = product + part @ right[..., i * layer_width : (i + 1) * layer_width, :]
        return product

    def transposed_times(left: Array) -> Array:
        return xp.concat([xp.matrix_transpose(part) @ left for part in parts], axis=-2)

    n_columns = min(rank + max(8, rank // OVERSAMPLE_SHARE), width)
    if n_columns == width:
        right = xp.broadcast_to(
            xp.eye(width, dtype=dtype, **backend.placement), (*batch, width, width)
        )
        projected = times(right)
    else:
        start = xp.astype(backend.normal((width, n_columns), seed), dtype)
        right = xp.broadcast_to(start, (*batch, width, n_columns))
        for _ in range(power_iterations + 1):
            left = _orthonormalize(backend, times(right))
            right = _orthonormalize(backend, transposed_times(left))
            backend.evaluate(right)
        projected = times(right)
    # the eigenvectors of the small Gram matrix turn the columns onto the singular directions
    eigenvalues, turn = backend.eigh(xp.matrix_transpose(projected) @ projected)
    order = xp.arange(n_columns - 1, n_columns - 1 - rank, -1, **backend.placement)
    turn = xp.take(turn, order, axis=-1)
    spectrum = xp.sqrt(xp.clip(xp.take(eigenvalues, order, axis=-1), 0, None))
    latent = xp.astype(projected @ turn, layers[0].dtype)
    basis = xp.astype(xp.matrix_transpose(right @ turn), layers[0].dtype)
    bases = tuple(
        backend.own(
            xp.reshape(
                basis[..., i * layer_width : (i + 1) * layer_width],
                (*batch, rank, n_kv_heads, head_dim),
            )
        )
        for i in range(len(layers))
    )
    return Factors(latent, bases, spectrum)


def _orthonormalize(backend: Backend, x: Array) -> Array:
    """Orthonormal columns with the span of ``x``, by three passes of shifted Cholesky QR."""
    xp = backend.xp
    eye = xp.eye(x.shape[-1], dtype=x.dtype, **backend.placement)
    for _ in range(3):
        gram = xp.matrix_transpose(x) @ x
        mean_diagonal = xp.sum(gram * eye, axis=(-2, -1), keepdims=True) / x.shape[-1]
        # the smallest normal number keeps an all-zero matrix from stopping the factorization
        shift = mean_diagonal * (4 * xp.finfo(x.dtype).eps) + 1e-30
        while (factor := backend.cholesky(gram + shift * eye)) is None:
            shift = shift * 10
        x = x @ xp.matrix_transpose(backend.solve_triangular(factor, eye))
    return x
