"""Caches of the package VeloxQuant-MLX, as they come."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.ops.types import Array
from xkv.planning.document import Document

KINDS = "xkv", "palu", "kvtc"
INSTALL = "pip install veloxquant-mlx"


@dataclass(frozen=True)
class VeloxQuant(Method):
    """The rows that a cache of VeloxQuant-MLX gives back for a whole document, on MLX only.

    The package's default options, but for two that depend on the model: ``xkv_max_ctx`` is the
    document's length and ``kvtc_bit_budget`` is 4 bits a feature.

    The bytes are those of all MLX arrays that stay alive between steps in and behind the caches.
    They are more than the package's own count, which ``detail`` tells: that is the size of the
    codes, while the caches also keep the rows that they rebuilt (or, in part, never drop the exact
    ones). What a cache holds outside MLX is not counted.

    Args:
        kind: ``xkv``, ``palu`` or ``kvtc``: the package's adaptations of arXiv:2503.18893,
            arXiv:2407.21118 and arXiv:2511.01815.

    Source: https://pypi.org/project/veloxquant-mlx, version 0.94.
    """

    name = "veloxquant"
    has_free_size = False

    kind: str = "xkv"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        backend = document.backend
        if backend.name != "mlx":
            raise InputError("veloxquant runs on MLX only: choose the mlx backend")
        backend.evaluate(*document.keys, *document.values)
        before = backend.active_memory()
        caches = self._make_caches(document)
        rows = []
        for cache, keys, values in zip(caches, document.keys, document.values, strict=True):
            rows.append(_fetch(document, cache, keys, values))
        held = backend.active_memory() - before
        told = sum(_told_bytes(cache) for cache in caches)
        keys, values = ([backend.from_numpy(pair[i]) for pair in rows] for i in range(2))
        detail = f"{told} bytes by the package's own count"
        return compressed_rows(document, held, keys, values, detail=detail)

    def _make_caches(self, document: Document) -> list[Any]:
        """As the package makes them for a model."""
        try:
            from veloxquant_mlx.cache.base import KVCacheBuilder, KVCacheConfig
        except ModuleNotFoundError as error:
            raise InputError(
                f"veloxquant needs {error.name}, which is not installed: {INSTALL}"
            ) from error
        head_dim = document.keys[0].shape[-1]
        layer = SimpleNamespace(self_attn=SimpleNamespace(head_dim=head_dim))
        config = KVCacheConfig(
            method=self.kind,  # type: ignore[arg-type]
            head_dim=head_dim,
            seed=document.seed,
            xkv_max_ctx=document.n_tokens,
            kvtc_bit_budget=4 * head_dim,
        )
        return KVCacheBuilder.for_model(
            SimpleNamespace(layers=[layer] * len(document.keys)), config
        )


def _fetch(document: Document, cache: Any, keys: Array, values: Array) -> list[np.ndarray]:
    """What a cache gives back, as numpy, so that only what the cache holds stays alive in MLX."""
    backend = document.backend
    # copied, even where MLX would share a buffer: an exact row that the cache keeps has to count
    copies = [backend.xp.concat([x[..., :0, :], x], axis=-2) for x in (keys, values)]
    return [backend.to_numpy(x) for x in cache.update_and_fetch(*copies)]


def _told_bytes(cache: Any) -> int:
    """Bytes of keys and values by the package's count."""
    keys = cache.compressed_key_bytes + getattr(cache, "shared_basis_bytes", 0)
    values = getattr(cache, "compressed_value_bytes", None)
    return keys + (cache.value_fp16_bytes if values is None else values)
