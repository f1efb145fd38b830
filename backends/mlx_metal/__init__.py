"""xKV on MLX: the backend, the mlx-lm cache and the generation engine."""

from __future__ import annotations

from typing import Any

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.cache import XKVCache, make_prompt_cache
from xkv.backends.mlx_metal.enable import disable, enable
from xkv.backends.mlx_metal.seam import attention_seam
from xkv.engine import Engine
from xkv.kernels import KernelMode

__all__ = [
    "MLXBackend",
    "XKVCache",
    "attention_seam",
    "disable",
    "enable",
    "load_engine",
    "make_backend",
    "make_prompt_cache",
]


def make_backend(kernels: KernelMode = "auto") -> MLXBackend:
    """The MLX backend on the default device."""
    return MLXBackend(kernels)


def load_engine(model: str, **options: Any) -> Engine:
    """See :func:`xkv.engine.load_engine`."""
    from xkv.backends.mlx_metal import engine

    return engine.load_engine(model, **options)
