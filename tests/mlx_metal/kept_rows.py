"""Conversations whose rows are known without a model, and a folder that they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from xkv.backends.mlx_metal.server.disk import Disk
from xkv.backends.mlx_metal.server.disk_cache import DiskPromptCache

N_LAYERS = 2
ROW_BYTES = 2 * N_LAYERS * 2 * 8 * 4
"""Of one token: keys and values of all layers."""


class Plain(nn.Module):
    """A model as far as its caches go."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = mx.full((4, 4), weight)

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in range(N_LAYERS)]


class Kept(DiskPromptCache):
    """A server's cache over a folder, as after a start."""

    def __init__(
        self, folder: Path, limit_bytes: int = 10**8, model: nn.Module | None = None, size: int = 9
    ) -> None:
        self.model = Plain() if model is None else model
        super().__init__(size, None, Disk(folder, limit_bytes), lambda: [self.model, None])

    @property
    def disk(self) -> dict[str, Any]:
        """The report once everything is written."""
        self._disk.flush()
        return self.report()["disk"]

    def take(self, tokens: list[int]) -> None:
        """A conversation is over."""
        self.insert_cache("model", list(tokens), caches_of(tokens))

    def cached(self, tokens: list[int]) -> int:
        """How many tokens of a prompt are found, with the rows that they must have."""
        found, rest = self.fetch_nearest_cache("model", tokens)
        n_tokens = len(tokens) - len(rest)
        assert tokens[n_tokens:] == rest and rest
        if found is None:
            return n_tokens
        for layer, wanted in zip(found, caches_of(tokens[:n_tokens]), strict=True):
            assert layer.offset == n_tokens
            for name in ("keys", "values"):
                mine, right = (getattr(x, name)[..., :n_tokens, :] for x in (layer, wanted))
                assert mx.array_equal(mine, right)
        return n_tokens


def caches_of(tokens: list[int]) -> list[KVCache]:
    """Rows each of which depends on all tokens up to its own, as a model's do."""
    seen = np.cumsum(np.array(tokens) * np.arange(1, len(tokens) + 1)) % 9973
    caches = []
    for number in range(N_LAYERS):
        rows = (seen[:, None, None] * (1 + np.arange(16).reshape(2, 8)) + number).swapaxes(0, 1)
        keys = mx.array(rows[None].astype(np.float32))
        cache = KVCache()
        cache.update_and_fetch(keys, -keys)
        caches.append(cache)
    return caches


def tokens_of(number: int, n_tokens: int = 40) -> list[int]:
    """Tokens of a conversation that shares none of its beginning with others."""
    return [1 + (number * 31 + i * 7) % 97 for i in range(n_tokens)]


def files_of(folder: Path, end: str) -> set[Path]:
    return set(folder.glob(f"*{end}"))


def bytes_of(folder: Path) -> int:
    """Bytes of all files in a folder, others' too."""
    return sum(x.stat().st_size for x in folder.iterdir())
