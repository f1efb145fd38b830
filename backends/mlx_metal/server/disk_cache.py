"""The server's prompt cache, whose conversations survive it on disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server.budget import PromptCache, is_at
from xkv.backends.mlx_metal.server.disk import Disk
from xkv.backends.mlx_metal.server.disk_conversation import Conversation
from xkv.backends.mlx_metal.server.disk_form import back_to, identity_of, take_apart
from xkv.backends.mlx_metal.server.need import RequestBytes
from xkv.errors import InputError

mlx_cache = borrowed.module("mlx_lm.models.cache")

_OPTIONS = ("kv_bits", "kv_group_size", "quantized_kv_start")
"""mlx-lm's flags that a full cache's rows depend on."""


def prompt_cache(
    size: int, args: argparse.Namespace, models: Callable[[], Sequence[Any]]
) -> PromptCache:
    """The cache of a server.

    Args:
        size: Most conversations in memory.
        args: The command's flags.
        models: Gives the model and the draft model that are loaded.

    Raises:
        InputError: If the folder for conversations cannot be used.
    """
    if args.prompt_cache_dir is None:
        return PromptCache(size, args.prompt_cache_bytes)
    if mx.distributed.init().size() > 1:
        raise InputError(
            "--prompt-cache-dir is for a model on one device, and this one runs on several: "
            "leave it out"
        )
    disk = Disk(Path(args.prompt_cache_dir), args.prompt_cache_disk_bytes)
    options = [vars(args).get(name) for name in _OPTIONS]
    return DiskPromptCache(size, args.prompt_cache_bytes, disk, models, options)


class DiskPromptCache(PromptCache):
    """A prompt cache that writes what it is given, and finds it again after a restart.

    Args:
        max_size: Most conversations in memory.
        limit_bytes: Most bytes of all KV caches, None for no cap of their own.
        disk: Where they are written.
        models: Gives the model and the draft model that are loaded.
        options: What the rows depend on beside them.
    """

    def __init__(
        self,
        max_size: int,
        limit_bytes: int | None,
        disk: Disk,
        models: Callable[[], Sequence[Any]],
        options: Sequence[Any] = (),
    ) -> None:
        super().__init__(max_size, limit_bytes)
        self._disk = disk
        self._models = models
        self._options = options
        self._identified: tuple[Any, str] | None = None
        # nothing that is let go is in the writer's hands: memory is free when it counts as free
        self._trie.before_release = disk.flush

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """A copy of the longest beginning of a prompt in memory or on disk."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if self._load(model, tokens, len(tokens) - len(rest)):
            del cache
            return super().fetch_nearest_cache(model, tokens)
        return cache, rest

    def _load(self, model: Any, tokens: list[int], n_cached: int) -> bool:
        """Take a conversation into memory, if it saves more of a prompt than those there."""
        found, n_served = self._disk.find(self._identity(model), tokens, n_cached)
        if found is None:
            return False
        need = self._need_of(found, n_served)
        if self.why_not(need) is not None:
            return False
        self._make_room({}, need)
        caches = self._disk.load(found)
        if caches is None:
            return False
        if not self._take(caches) or not is_at(caches, len(found.tokens)):
            self._disk.drop(found, "its layers are not those of the model")
            return False
        super()._keep(model, found.tokens.tolist(), caches)
        return True

    def _need_of(self, found: Conversation, n_served: int) -> RequestBytes:
        """What requests take while a conversation is read, of which one of them goes on."""
        need = self.reserved
        beyond = found.nbytes * (len(found.tokens) - n_served) // len(found.tokens)
        return RequestBytes(max(need.cache + beyond, found.nbytes), need.work)

    def _take(self, caches: list[Any]) -> bool:
        """Let caches be as those that the models make; whether they can be."""
        models = [model for model in self._models() if model is not None]
        made = list(flatten([x for model in models for x in mlx_cache.make_prompt_cache(model)]))
        layers = list(flatten(caches))
        if [type(x) for x in layers] != [type(x) for x in made]:
            return False
        for layer, like in zip(layers, made, strict=True):
            if isinstance(layer, XKVCache):
                layer.is_attended_once = like.is_attended_once
                layer.layer.cache.backend = like.layer.cache.backend
        return True

    def _keep(self, model: Any, tokens: list[int], prompt_cache: list[Any], **kwargs: Any) -> None:
        super()._keep(model, tokens, prompt_cache, **kwargs)
        try:
            apart = take_apart(prompt_cache)
        except InputError as error:
            self._disk.tell("form", f"conversations of this model stay in memory alone: {error}")
        else:
            points = back_to(prompt_cache, len(tokens))
            self._disk.keep(self._identity(model), tokens, points, apart)

    def _identity(self, model: Any) -> str:
        if self._identified is None or self._identified[0] != model:
            self._identified = model, identity_of(self._models(), self._options)
        return self._identified[1]

    def report(self) -> dict[str, Any]:
        """Bytes in memory and on disk, and the limits."""
        return {**super().report(), "disk": self._disk.report()}

    def close(self) -> None:
        """Write what is not written yet; there is nothing to be kept from then on."""
        self._disk.close()
