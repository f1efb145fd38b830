"""What the server's requests and cached prompts take, and the limits that they are kept under."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.going_back import go_back, reach, states_of
from xkv.backends.mlx_metal.model.memory import cache_text, dense_bytes
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server.need import RequestBytes, memory_limit

mlx_cache = borrowed.module("mlx_lm.models.cache")


def arrays_held(caches: Sequence[Any]) -> dict[int, int]:
    """Bytes of each array of a prompt cache by identity, which copies of the cache share."""
    held: dict[int, int] = {}
    for cache in flatten(caches):
        if isinstance(cache, XKVCache):
            arrays = (*cache.layer.arrays(), *cache.layer.group.arrays())
            held.update((id(x), x.nbytes) for x in arrays)
        else:
            held[id(cache)] = cache.nbytes
    held.update((id(x), x.nbytes) for state in states_of(caches) for x in state.arrays)
    return held


def unused_bytes(caches: Sequence[Any]) -> int:
    """Bytes of rows that were cut off, which a cache still holds with those it shares."""
    unused = 0
    for cache in flatten(caches):
        if isinstance(cache, XKVCache) and cache.layer.index == 0:
            for store in cache.layer.group.state.stores:
                n_rows = store.latent.shape[1]
                unused += store.latent.nbytes * (n_rows - cache.layer.rows.n_segment) // n_rows
    return unused


@dataclass
class _Held:
    """What one cached prompt holds; nothing but its use changes while it is cached."""

    arrays: dict[int, int]
    n_tokens: int
    dense_bytes: int
    used: float

    def report(self) -> dict[str, Any]:
        """The prompt alone, with what it shares with others."""
        held = sum(self.arrays.values())
        return {
            "tokens": self.n_tokens,
            "held_bytes": held,
            "dense_bytes": self.dense_bytes,
            "ratio": round(self.dense_bytes / held, 3) if held else None,
            "idle_s": round(time.monotonic() - self.used, 1),
        }


class _Trie(mlx_cache.PromptTrie):  # type: ignore[name-defined]
    """mlx-lm's, which also lists what its entries hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, _Held] = {}
        self.before_release: Callable[[], Any] = lambda: None
        """Called before an entry goes."""

    def add(self, model: Any, tokens: list[int], value: Any) -> Any:
        caches = value.prompt_cache
        dense = sum(dense_bytes(cache) for cache in caches)
        self.held[id(value)] = _Held(arrays_held(caches), len(tokens), dense, time.monotonic())
        return self._forget(super().add(model, tokens, value))

    def get(self, model: Any, tokens: list[int]) -> Any:
        value = super().get(model, tokens)
        self.held[id(value)].used = time.monotonic()
        return value

    def pop(self, model: Any, tokens: list[int]) -> Any:
        return self._forget(super().pop(model, tokens))

    def pop_prefixes(self, model: Any, tokens: list[int]) -> Any:
        popped = super().pop_prefixes(model, tokens)
        for _, value in popped:
            self._forget(value)
        return popped

    def _forget(self, value: Any) -> Any:
        if value is not None:
            self.before_release()
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
        self.needed: Callable[[], RequestBytes] = RequestBytes
        """Gives what the requests being answered take at most, together."""
        self.active: Callable[[], Mapping[int, int]] = dict
        """Gives the bytes of each array that they hold by now, by identity."""
        self.holds_more: Callable[[int], Any] = lambda n_bytes: None
        """Called with the bytes of rows that a request's copy holds and does not use."""
        self.after_keeping: Callable[[], Any] = lambda: None
        """Called once a request's cache is kept, or dropped."""

    @property
    def reserved(self) -> RequestBytes:
        """What the requests being answered take at most."""
        return self.needed()

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
        free = self._free()
        if need.cache + need.work > free:
            return (
                f"it takes up to {(need.cache + need.work) / 1e6:.1f} MB, and {free / 1e6:.1f} MB "
                "of memory are left"
            )
        return None

    def _free(self) -> int:
        """Bytes that a request could have, were there no other."""
        held = {**self._arrays(), **self.active()}
        return self.memory_limit - mx.get_active_memory() + sum(held.values())

    def has_room(self, need: RequestBytes) -> bool:
        """Whether a request fits beside those that run, if nothing is cached."""
        total = need + self.reserved
        is_under_cap = self.limit_bytes is None or total.cache <= self.limit_bytes
        return is_under_cap and total.cache + total.work <= self._free()

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """A copy of the longest cached beginning of a prompt, all but its last token at most.

        Others are evicted so that the request fits.
        """
        # mlx-lm cannot generate from an empty prompt
        found = self._trie.search(model, tokens[:-1])
        cache, n_tokens = None, 0
        for name in (found.exact, found.shorter, found.longer):
            if name:
                held = self._trie.get(model, name).prompt_cache
                n_shared = found.common_prefix if name is found.longer else len(name)
                n_reached = reach(held, len(name), n_shared)
                if n_reached > n_tokens:
                    cache, n_held, n_tokens = held, len(name), n_reached
        if cache is not None:
            cache = copy.deepcopy(cache)
            go_back(cache, n_held, n_tokens)
            self.holds_more(unused_bytes(cache))
        self._make_room(arrays_held(cache or []), self.reserved)
        return cache, tokens[n_tokens:]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any
    ) -> None:
        """Keep a request's cache, if all of its layers have seen the same tokens."""
        tokens = _in_step(tokens, prompt_cache)
        logging.info(cache_text(prompt_cache))
        if tokens and is_at(prompt_cache, len(tokens)):
            self._keep(model, tokens, prompt_cache, **kwargs)
        self._make_room({}, self.reserved)
        self.after_keeping()

    def _keep(self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any) -> None:
        super().insert_cache(model, tokens, prompt_cache, **kwargs)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict conversations; how many bytes they may take is known here."""
        if n_bytes is not None:
            self._make_room({}, self.reserved)
        if n_sequences is not None:
            super().trim_to(n_sequences=n_sequences)

    def _make_room(self, active: dict[int, int], need: RequestBytes) -> None:
        """Evict until the arrays of requests, and what they will need, fit."""
        active = {**self.active(), **active}
        cache = max(need.cache - sum(active.values()), 0)
        while len(self):
            held = sum({**self._arrays(), **active}.values())
            fits = self.limit_bytes is None or held + cache <= self.limit_bytes
            if fits and mx.get_active_memory() + cache + need.work <= self.memory_limit:
                return
            self.trim_to(n_sequences=len(self) - 1)
            mx.clear_cache()

    def close(self) -> None:
        """Called when nothing will be asked any more."""

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
            "conversations": [entry.report() for entry in entries],
        }


def is_at(caches: Sequence[Any], n_tokens: int) -> bool:
    """Whether every layer has seen ``n_tokens`` tokens; states count none."""
    return all(getattr(cache, "offset", n_tokens) == n_tokens for cache in flatten(caches))


def _in_step(tokens: list[int], caches: list[Any]) -> list[int]:
    """Cut tokens and caches to the same length: after speculative decoding they differ."""
    if not mlx_cache.can_trim_prompt_cache(caches):
        return tokens
    layers = [cache for cache in flatten(caches) if hasattr(cache, "offset")]
    n_tokens = min([len(tokens), *(layer.offset for layer in layers)])
    for layer in layers:
        layer.trim(layer.offset - n_tokens)
    return tokens[:n_tokens]
