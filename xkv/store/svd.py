"""Joint factorization of one layer group into a shared latent and a basis per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array

OVERSAMPLE_SHARE = 4
"""The iteration carries ``rank // OVERSAMPLE_SHARE`` more columns, at least 8, and drops them."""


DIRECT_WIDTH = 2048
"""Up to this joint width all eigenvectors cost less than an iteration for a third of them."""

GRAM_SHARE = 8
"""From this share of the joint width on, the iteration runs on the joint Gram matrix."""


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
    product_dtype: Any = None,
) -> Factors:
    """Factor one layer group's keys (or values) into a shared latent.

    Randomized subspace iteration: tall products on the accelerator, and only matrices of about
    ``rank x rank`` in the Cholesky and eigenvalue routines. Where the rank is a large share of the
    joint width, the iteration runs on the joint Gram matrix: the rows are read twice in all.

    Args:
        layers: One array per layer, ``[..., L, n_kv_heads, head_dim]``, any float dtype. Keys must
            be pre-RoPE. Leading axes are batches, each with factors of its own.
        rank: Columns to keep, 1 to ``len(layers) * n_kv_heads * head_dim``.
        power_iterations: More of them bring the error closer to the optimal truncation.
        seed: The random start is drawn by numpy, so it is the same on every backend.
        product_dtype: A 16-bit dtype in which the rows are multiplied, with sums in float32. None
            is what the backend takes for the layers' dtype: the same on CUDA, float32 or wider
            elsewhere.

    Returns:
        latent: ``[..., L, rank]``, columns in order of falling singular value, in the layers'
            dtype.
        bases: One per layer, ``[..., rank, n_kv_heads, head_dim]``. Only the product is defined.
        spectrum: ``[..., rank]`` float32 singular values (float64 for float64 layers).

    Raises:
        InputError: If the rank is out of range, the shapes differ, or a number is not finite.

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
    flat = [xp.reshape(x, (*batch, n_tokens, layer_width)) for x in layers]
    product_dtype = product_dtype or backend.product_dtype(layers[0].dtype)
    rows = _Rows(backend, flat, backend.accumulate_dtype(layers[0]), product_dtype)
    n_columns = iteration_columns(rank, width)
    if uses_gram(n_columns, width):
        rows.make_gram()
    right = projected = None
    if n_columns < width:
        right = _leading_directions(rows, width, n_columns, power_iterations, seed)
    # the eigenvectors of the small Gram matrix turn the columns onto the singular directions
    if right is None:
        small = rows.gram
    elif rows.gram is not None:
        small = xp.matrix_transpose(right) @ (rows.gram @ right)
    else:
        projected = rows.times(right)
        small = xp.matrix_transpose(projected) @ projected
    _check_finite(backend, small)
    eigenvalues, turn = backend.eigh(small)
    order = xp.arange(n_columns - 1, n_columns - 1 - rank, -1, **backend.placement)
    turn = xp.take(turn, order, axis=-1)
    spectrum = xp.sqrt(xp.clip(xp.take(eigenvalues, order, axis=-1), 0, None))
    right = turn if right is None else right @ turn
    latent = rows.times(right) if projected is None else projected @ turn
    latent = xp.astype(latent, layers[0].dtype)
    backend.evaluate(latent, right)
    basis = xp.astype(xp.matrix_transpose(right), layers[0].dtype)
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


def iteration_columns(rank: int, width: int) -> int:
    """Columns that the subspace iteration carries; all of ``width`` where it is not needed."""
    n_columns = rank + max(8, rank // OVERSAMPLE_SHARE)
    if width <= DIRECT_WIDTH and n_columns > width // 3:
        return width
    return min(n_columns, width)


def uses_gram(n_columns: int, width: int) -> bool:
    """Whether multiplying by the joint Gram matrix costs less than by the rows and back."""
    return n_columns == width or n_columns > width // GRAM_SHARE


class _Rows:
    """``X = [X_1 ... X_W]``, never joined.

    Args:
        parts: One ``[..., L, layer width]`` a layer.
        dtype: Of products.
        product_dtype: Of what is multiplied, if not the same.
    """

    def __init__(
        self, backend: Backend, parts: Sequence[Array], dtype: Any, product_dtype: Any
    ) -> None:
        self.backend, self.dtype, self.product_dtype = backend, dtype, product_dtype
        self.parts = [backend.xp.astype(x, product_dtype or dtype) for x in parts]
        self.gram: Array | None = None
        """``X^T X``, where it was made."""

    def times(self, right: Array) -> Array:
        """``X @ right``"""
        width, product = self.parts[0].shape[-1], None
        for i, part in enumerate(self.parts):
            added = self._product(part, right[..., i * width : (i + 1) * width, :])
            if product is None:
                product = added
            else:
                product += added
            # one at a time: they are as long as the prompt
            self.backend.evaluate(product)
        return product

    def transposed_times(self, left: Array) -> Array:
        """``X^T @ left``"""
        xp = self.backend.xp
        products = [self._product(xp.matrix_transpose(part), left) for part in self.parts]
        return xp.concat(products, axis=-2)

    def _product(self, rows: Array, other: Array) -> Array:
        if self.product_dtype is None:
            return rows @ other
        xp, backend = self.backend.xp, self.backend
        first = xp.astype(other, self.product_dtype)
        product = backend.wide_product(rows, first)
        if other.dtype != self.product_dtype:
            # what rounding took off is a second matrix of the same dtype
            rest = xp.astype(other - xp.astype(first, other.dtype), self.product_dtype)
            product = product + backend.wide_product(rows, rest)
        return product

    def make_gram(self) -> None:
        """Multiply every layer with itself and with those after it; the rest mirrors that."""
        xp = self.backend.xp
        blocks: list[list[Array]] = []
        for i, left in enumerate(self.parts):
            mirrored = [xp.matrix_transpose(row[i]) for row in blocks]
            turned = xp.matrix_transpose(left)
            blocks.append([*mirrored, *(self._product(turned, x) for x in self.parts[i:])])
            self.backend.evaluate(*blocks[-1])
        self.gram = xp.concat([xp.concat(row, axis=-1) for row in blocks], axis=-2)
        self.backend.evaluate(self.gram)


def _leading_directions(
    rows: _Rows, width: int, n_columns: int, power_iterations: int, seed: int
) -> Array:
    """Orthonormal columns ``[..., width, n_columns]`` near the leading right singular vectors."""
    backend, xp = rows.backend, rows.backend.xp
    batch, dtype = rows.parts[0].shape[:-2], rows.dtype
    start = xp.astype(backend.normal((width, n_columns), seed), dtype)
    right = xp.broadcast_to(start, (*batch, width, n_columns))
    for _ in range(power_iterations + 1):
        if rows.gram is None:
            right = rows.transposed_times(_orthonormalize(backend, rows.times(right)))
        else:
            right = rows.gram @ right
        right = _orthonormalize(backend, right)
        backend.evaluate(right)
    return right


def _check_finite(backend: Backend, x: Array) -> None:
    if not bool(backend.xp.all(backend.xp.isfinite(x))):
        raise InputError("the rows hold NaN or infinity, which cannot be factored")


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
            _check_finite(backend, shift)
            shift = shift * 10
        x = x @ xp.matrix_transpose(backend.solve_triangular(factor, eye))
    return x
