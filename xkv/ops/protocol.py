"""What a framework must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from xkv.ops.types import Array, RopeSpec, Stored


class Operations(ABC):
    """What arithmetic on one framework and device is made of.

    The method is written once over the array API standard (``xp``). A framework adds what the
    standard has no word for. Fused operations, last, have bodies in
    :class:`xkv.ops.backend.Backend`.
    """

    name: str
    xp: Any
    """The framework's array API namespace."""

    @property
    @abstractmethod
    def placement(self) -> dict[str, Any]:
        """Keyword arguments with which ``xp`` creates arrays on this backend's device."""

    @property
    @abstractmethod
    def device_name(self) -> str:
        """What the arithmetic runs on, for people."""

    @abstractmethod
    def from_numpy(self, array: np.ndarray) -> Array:
        """The array on this backend's device, in its numpy dtype."""

    @abstractmethod
    def to_numpy(self, array: Array) -> np.ndarray:
        """The values as numpy; bfloat16 becomes float32."""

    @abstractmethod
    def evaluate(self, *arrays: Array) -> None:
        """Force lazy or asynchronous work on these arrays to finish."""

    @abstractmethod
    def own(self, array: Array) -> Array:
        """A row-contiguous copy that shares no memory with ``array``."""

    @abstractmethod
    def cholesky(self, x: Array) -> Array | None:
        """Lower Cholesky factor of ``[..., k, k]``, or None if one is not positive definite."""

    @abstractmethod
    def triangular_inverse(self, lower: Array) -> Array:
        """Of a lower triangular ``[..., k, k]``."""

    @abstractmethod
    def eigh(self, x: Array) -> tuple[Array, Array]:
        """Eigenvalues ``[..., k]``, ascending, and eigenvectors in columns of symmetric ``x``."""

    @abstractmethod
    def attention(
        self, queries: Array, keys: Array, values: Array, scale: float, mask: Array | None
    ) -> Array:
        """The framework's attention, over keys and values ``[B, n_kv_heads, L, dim]``."""

    @abstractmethod
    def split(self, x: Array, widths: Sequence[int]) -> Sequence[Array]:
        """Neighbouring parts of an array, of these sizes along its last axis."""

    @abstractmethod
    def top_indices(self, scores: Array, count: int) -> Array:
        """Where the ``count`` largest of the last axis are (all, if fewer), in any order."""

    @abstractmethod
    def quantize(self, x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
        """MLX's affine layout: 32-bit words, scales and biases, by groups of the last axis.

        ``bits`` are 2, 3, 4, 5, 6 or 8; ``group_size`` 32, 64 or 128.
        """

    @abstractmethod
    def dequantize(self, packed: tuple[Array, ...], group_size: int, bits: int) -> Array:
        """The inverse of :meth:`quantize`, in the scales' dtype."""

    def product_dtype(self, dtype: Any) -> Any:
        """The dtype in which rows of a KV dtype are multiplied to be factored; None for float32."""
        return None

    def wide_product(self, left: Array, right: Array) -> Array:
        """``left @ right`` of 16-bit matrices ``[..., M, K]`` and ``[..., K, N]``, in float32."""
        xp = self.xp
        return xp.astype(left, xp.float32) @ xp.astype(right, xp.float32)

    @abstractmethod
    def active_memory(self) -> int:
        """Bytes of all live arrays, as the framework counts them."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Largest bytes in use since the last :meth:`reset_peak_memory`."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new measurement of :meth:`peak_memory`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Operations:
        return self

    def constant(self, values: Sequence[float], dtype: Any) -> Array:
        """A small 1-d array of Python numbers."""
        return self.xp.asarray(values, dtype=dtype, **self.placement)

    def accumulate_dtype(self, x: Array) -> Any:
        """float64 for float64 arrays, otherwise float32."""
        return x.dtype if x.dtype == self.xp.float64 else self.xp.float32

    def normal(self, shape: tuple[int, ...], seed: int) -> Array:
        """Standard normal float32 numbers, the same on every backend."""
        numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return self.from_numpy(numbers)

    def positions(self, start: int, n_rows: int) -> Array:
        """``start, start + 1, ...`` as integers."""
        return self.xp.arange(start, start + n_rows, **self.placement)

    @abstractmethod
    def rope(
        self, x: Array, positions: Array | int, spec: RopeSpec, inverse: bool = False
    ) -> Array:
        """:func:`xkv.ops.rope.rotate`; an int stands for consecutive rows from that position on."""

    @abstractmethod
    def logsumexp(self, x: Array) -> Array:
        """``log(sum(exp(x)))`` over the last axis."""

    @abstractmethod
    def put_along(self, x: Array, at: Array, values: Array) -> Array:
        """``[B, n_kv_heads, N(, dim)]`` with other values at ``[B, n_kv_heads, n]`` of axis 2."""

    def add_product(self, x: Array, left: Array, right: Array) -> Array:
        """``x + left @ right``"""
        return x + left @ right

    def step_dtype(self, dtype: Any) -> Any:
        """In which a decode step computes where rows are held in ``dtype``."""
        return dtype

    @abstractmethod
    def block_angles(
        self, spec: RopeSpec, start: int, n_blocks: int, has_rest: bool, dtype: Any
    ) -> Array:
        """:func:`xkv.ops.index.block_numbers` of at least so many blocks, kept for later calls."""

    @abstractmethod
    def attend_dense(self, queries: Array, dense: Any, sinks: Array | None) -> tuple[Array, Array]:
        """:func:`xkv.ops.working_set.attend_dense`"""

    @abstractmethod
    def query_terms(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        """:func:`xkv.ops.index.query_terms`"""

    @abstractmethod
    def index_scores(self, absorbed: Array, latent: Any, offsets: Array, n_kv_heads: int) -> Array:
        """:func:`xkv.ops.index.index_scores`"""

    @abstractmethod
    def choose_rows(self, worth: Array, count: int) -> Array:
        """:func:`xkv.ops.working_set.choose_rows`"""

    @abstractmethod
    def key_scores(self, stored: Stored, rows: Array, queries: Array) -> Array:
        """:func:`xkv.ops.working_set.key_scores`"""

    @abstractmethod
    def weigh_rows(
        self, latent: Any, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        """:func:`xkv.ops.working_set.weigh_rows`"""
