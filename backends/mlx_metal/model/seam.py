"""Where mlx-lm's models reach their attention."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed

_NAME = "scaled_dot_product_attention"


class AttendingCache:
    """A cache that may compute the attention over what it returned itself."""

    def takes(self, keys: Any, values: Any) -> bool:
        """Whether attention over exactly these arrays is this cache's to compute."""
        raise NotImplementedError

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of the newest tokens ``[B, n_heads, L, head_dim]`` over the cache.

        Args:
            sinks: ``[n_heads]``: scores of nothing, that take a part of each head's weights.
        """
        raise NotImplementedError


class Patch:
    """A function of mlx-lm that is replaced in every module that holds it, while anyone needs it.

    Models import their attention by name, and so do programs with the generation loops.

    Args:
        home: The module, or the class, that defines it.
        name: Its name there.
        replace: Makes the replacement of the original.
    """

    def __init__(self, home: Any, name: str, replace: Callable[[Any], Any]) -> None:
        self._home, self._name, self._replace = home, name, replace
        self._original: Any = None
        self._mine: Any = None
        self._n_users = 0

    @property
    def is_installed(self) -> bool:
        return self._n_users > 0

    def install(self) -> None:
        if self._n_users == 0:
            self._original = getattr(self._home, self._name)
            self._mine = self._replace(self._original)
            self._rebind(self._original, self._mine)
        self._n_users += 1

    def remove(self) -> None:
        self._n_users -= 1
        if self._n_users == 0:
            # models that were loaded meanwhile hold the replacement too
            self._rebind(self._mine, self._original)

    def _rebind(self, old: Any, new: Any) -> None:
        for holder in (self._home, *sys.modules.values()):
            names = getattr(holder, "__dict__", None)
            if names is not None and names.get(self._name) is old:
                setattr(holder, self._name, new)


WATCHERS: list[Callable[[Any, Any], None]] = []
"""Called with the keys of each attention, and the cache that it is over."""


def attention_of(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A model's attention, that lets caches compute it which can."""

    def attention(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
        **kwargs: Any,
    ) -> mx.array:
        for watch in WATCHERS:
            watch(keys, cache)
        is_ours = isinstance(cache, AttendingCache) and not kwargs
        if is_ours and cache.takes(keys, values):
            return cache.attend(queries, scale, mask, sinks)
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **kwargs)

    return attention


ATTENTION = Patch(borrowed.module("mlx_lm.models.base"), _NAME, attention_of)


@contextlib.contextmanager
def attention_seam() -> Iterator[None]:
    """Let compressed caches compute attention themselves, in every mlx-lm model.

    Inside, ``scaled_dot_product_attention`` is rebound in ``mlx_lm.models.base`` and in every model
    module that imported it; other caches' calls go to the original unchanged.
    """
    ATTENTION.install()
    try:
        yield
    finally:
        ATTENTION.remove()
