"""Where mlx-lm's models reach their attention."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from xkv.backends.mlx_metal.cache import XKVCache

_NAME = "scaled_dot_product_attention"


@contextlib.contextmanager
def attention_seam() -> Iterator[None]:
    """Let compressed caches compute attention themselves, in every loaded mlx-lm model.

    Inside, ``scaled_dot_product_attention`` is rebound in ``mlx_lm.models.base`` and in every model
    module that imported it; other caches' calls go to the original unchanged. Models must be loaded
    before.
    """
    original = getattr(base, _NAME)

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
        if (
            sinks is None
            and not kwargs
            and isinstance(cache, XKVCache)
            and cache.takes(keys, values)
        ):
            return cache.attend(queries, scale, mask)
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **kwargs)

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and vars(module).get(_NAME) is original
    ]
    try:
        for module in holders:
            setattr(module, _NAME, attention)
        yield
    finally:
        for module in holders:
            setattr(module, _NAME, original)
