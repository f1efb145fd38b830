"""What the server's requests and cached prompts take, and the limits that they are kept under."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.enabled import Enabled
from xkv.backends.mlx_metal.model.memory import cache_text, dense_bytes
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.config import buffer_rows
from xkv.planning.footprint import storing_bytes
from xkv.store.ranks import WAIT_SHARE, ModelPlan, plan_ranks

mlx_cache = borrowed.module("mlx_lm.models.cache")


@dataclass(frozen=True)
class RequestBytes:
    """What a request takes at most.

    Args:
        cache: Its KV cache, while the last group of layers is dense or at the end of the answer.
        work: Besides: hidden states of the prompt, and a group's rows in float32 for factoring.
    """

    cache: int = 0
    work: int = 0

    def __add__(self, other: RequestBytes) -> RequestBytes:
        return RequestBytes(self.cache + other.cache, self.work + other.work)

    @classmethod
    def of(cls, enabled: Enabled, n_prompt: int, n_answer: int, is_layerwise: bool) -> RequestBytes:
        """Estimate a request before anything is computed.

        Args:
            enabled: The model.
            n_prompt: Tokens of the whole prompt, cached ones too.
            n_answer: Most tokens of the answer.
            is_layerwise: Whether at most one group of layers is dense at a time.
        """
        config, shape = enabled.plan.config, enabled.plan.probe.cache_shape(enabled.plan.groups)
        n_tokens = n_prompt + n_answer
        dense = shape.dense_bytes(buffer_rows(n_tokens))
        basis = enabled.basis
        is_long = not isinstance(plan_ranks(shape, config, n_prompt, basis=basis), str)
        ranks = plan_ranks(shape, config, n_tokens, 0.0 if is_long else WAIT_SHARE, basis)
        hidden = getattr(getattr(enabled.model, "args", None), "hidden_size", 0)
        work = 3 * n_prompt * hidden * shape.item_bytes
        if isinstance(ranks, str):
            return cls(dense, work)
        work += max(storing_bytes(n_prompt, group, basis is None) for group in shape.groups)
        if basis is not None and isinstance(ranks, ModelPlan):
            # the model's, and there for the next request
            work += max(basis.column_bytes(ranks.bits, shape.item_bytes) - basis.nbytes, 0)
        if not is_layerwise:
            return cls(dense, work)
        tail = shape.dense_bytes(min(n_answer, config.max_tail))
        group = max(x.n_layers * x.row_elements for x in shape.groups) * shape.item_bytes
        held = ranks.held_bytes(shape, config, n_tokens)
        return cls(min(dense, held + max(tail, group * buffer_rows(n_prompt))), work)


def memory_limit() -> int:
    """Bytes that MLX may use: the Mac's working set, or the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def arrays_held(caches: Sequence[Any]) -> dict[int, int]:
    """Bytes of each array of a prompt cache by identity, which copies of the cache share."""
    held: dict[int, int] = {}
    for cache in flatten(caches):
        if isinstance(cache, XKVCache):
            arrays = (*cache.layer.arrays(), *cache.layer.group.arrays())
            held.update((id(x), x.nbytes) for x in arrays)
        else:
            held[id(cache)] = cache.nbytes
    return held


@dataclass(frozen=True)
class _Held:
    """What one cached prompt holds; it does not change while it is cached."""

    arrays: dict[int, int]
    n_tokens: int
    dense_bytes: int


class _Trie(mlx_cache.PromptTrie):  # type: ignore[name-defined]
    """mlx-lm's, which also lists what its entries hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, _Held] = {}

    def add(self, model: Any, tokens: list[int], value: Any) -> Any:
        caches = value.prompt_cache
        dense = sum(dense_bytes(cache) for cache in caches)
        self.held[id(value)] = _Held(arrays_held(caches), len(tokens), dense)
        return self._forget(super().add(model, tokens, value))

    def pop(self, model: Any, tokens: list[int]) -> Any:
        return self._forget(super().pop(model, tokens))

    def pop_prefixes(self, model: Any, tokens: list[int]) -> Any:
        popped = super().pop_prefixes(model, tokens)
        for _, value in popped:
            self._forget(value)
        return popped

    def _forget(self, value: Any) -> Any:
        if value is not None:
            del self.held[id(value)]
        return value


class PromptCache(mlx_cache.LRUPromptCache):  # type: ignore[name-defined]
    """mlx-lm's prompt cache under a cap, in which the request being served counts too.

    Factors are immutable, so that conversations with the same beginning share them; every array
    counts once.

    Args:
        max_size: Most conversations.
        limit_bytes: Most bytes of all KV caches, None for no cap of their own.
    """

    def __init__(self, max_size: int, limit_bytes: int | None = None) -> None:
        super().__init__(max_size)
        self._trie: _Trie = _Trie()
        self.limit_bytes = limit_bytes
        self.memory_limit = memory_limit()
        self.reserved = RequestBytes()
        """What the request being served takes at most."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cached prompts, every array once."""
        return sum(self._arrays().values())

    def _arrays(self) -> dict[int, int]:
        held = list(self._trie.held.values())
        return {name: size for entry in held for name, size in entry.arrays.items()}

    def why_not(self, need: RequestBytes) -> str | None:
        """Why a request cannot be served even with nothing cached, in a sentence."""
        if self.limit_bytes is not None and need.cache > self.limit_bytes:
            return (
                f"its KV cache takes up to {need.cache / 1e6:.1f} MB, and --prompt-cache-bytes "
                f"allows {self.limit_bytes / 1e6:.1f} MB"
            )
        free = self.memory_limit - mx.get_active_memory() + self.nbytes
        if need.cache + need.work > free:
            return (
                f"it takes up to {(need.cache + need.work) / 1e6:.1f} MB, and {free / 1e6:.1f} MB "
                "of memory are left"
            )
        return None

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """A copy of the longest cached beginning of a prompt, all but its last token at most.

        Others are evicted so that the request fits.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest:
            # mlx-lm cannot generate from an empty prompt
            mlx_cache.trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        if cache is not None and not is_at(cache, len(tokens) - len(rest)):
            cache, rest = self._fetch_untrimmed(model, tokens)
        self._make_room(arrays_held(cache or []), self.reserved)
        return cache, rest

    def _fetch_untrimmed(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """A copy of the longest cached prompt that this one begins with."""
        result = self._trie.search(model, tokens[:-1])
        name = result.exact or result.shorter
        if not name:
            return None, tokens
        return copy.deepcopy(self._trie.get(model, name).prompt_cache), tokens[len(name) :]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep a request's cache, if all of its layers have seen the same tokens."""
        tokens = _in_step(tokens, prompt_cache)
        logging.info(cache_text(prompt_cache))
        if tokens and is_at(prompt_cache, len(tokens)):
            super().insert_cache(model, tokens, prompt_cache, **kwargs)
        self._make_room({}, RequestBytes())

    def _make_room(self, active: dict[int, int], need: RequestBytes) -> None:
        """Evict until the arrays that a request has, and what it will need, fit."""
        cache = max(need.cache - sum(active.values()), 0)
        while len(self):
            held = sum({**self._arrays(), **active}.values())
            fits = self.limit_bytes is None or held + cache <= self.limit_bytes
            if fits and mx.get_active_memory() + cache + need.work <= self.memory_limit:
                return
            self.trim_to(n_sequences=len(self) - 1)
            mx.clear_cache()

    def report(self) -> dict[str, Any]:
        """Bytes of the cached prompts, and the limits."""
        entries = list(self._trie.held.values())
        held, dense = self.nbytes, sum(entry.dense_bytes for entry in entries)
        return {
            "sequences": len(entries),
            "tokens": sum(entry.n_tokens for entry in entries),
            "held_bytes": held,
            "dense_bytes": dense,
            "ratio": round(dense / held, 3) if held else None,
            "reserved_bytes": self.reserved.cache,
            "limit_bytes": self.limit_bytes,
            "active_memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
            "memory_limit_bytes": self.memory_limit,
        }


def is_at(caches: Sequence[Any], n_tokens: int) -> bool:
    """Whether every layer can go on after ``n_tokens`` tokens.

    A chunked layer may have dropped tokens of the chunk that a trim goes back to, and trims no
    further than what it holds. State spaces count no tokens, and are never trimmed.
    """
    for cache in flatten(caches):
        if getattr(cache, "offset", n_tokens) != n_tokens:
            return False
        if isinstance(cache, mlx_cache.ChunkedKVCache):
            chunk = n_tokens // cache.chunk_size * cache.chunk_size
            if cache.start_position > chunk:
                return False
    return True


def _in_step(tokens: list[int], caches: list[Any]) -> list[int]:
    """Cut tokens and caches to the same length: after speculative decoding they differ."""
    if not mlx_cache.can_trim_prompt_cache(caches):
        return tokens
    layers = [cache for cache in flatten(caches) if hasattr(cache, "offset")]
    n_tokens = min([len(tokens), *(layer.offset for layer in layers)])
    for layer in layers:
        layer.trim(layer.offset - n_tokens)
    return tokens[:n_tokens]
