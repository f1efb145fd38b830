"""Compressed prompt caches for mlx-lm, in one line."""

from __future__ import annotations

from typing import Any

from xkv.backend import load_backend_module
from xkv.config import XKVConfig
from xkv.report import Report


def enable(model: Any, config: XKVConfig | None = None, **options: Any) -> Report:
    """Give a model of ``mlx_lm.load`` compressed prompt caches, until :func:`disable`.

    From then on every function of mlx-lm that makes a prompt cache for the model gets ours, and
    ``generate``, ``stream_generate`` and ``generate_step`` take prompts through the model layer by
    layer. A model that is enabled already gets the new configuration; caches that it made keep
    theirs.

    Args:
        model: From ``mlx_lm.load``.
        config: How to compress; instead of it, keyword arguments of :class:`xkv.XKVConfig`.

    Returns:
        What becomes of each layer; print it.

    Raises:
        InputError: If nothing of the model can be compressed, by name, or an option is wrong.
    """
    if config is not None and options:
        raise TypeError("give either a config or its options, not both")
    return load_backend_module("mlx").enable(model, config or XKVConfig(**options))


def disable(model: Any) -> None:
    """Give an enabled model back exactly as it was.

    Raises:
        InputError: If the model is not enabled.
    """
    load_backend_module("mlx").disable(model)


def save_prompt_cache(file_name: str, cache: Any, metadata: dict[str, str] | None = None) -> None:
    """Save a cache for either side; an older file survives a failure.

    Args:
        file_name: A ``.safetensors`` file, laid out as mlx-lm's prompt caches.
        cache: mlx-lm's list of caches, or what :func:`xkv.torch_cache` gave.
        metadata: Strings to keep with it.

    Raises:
        InputError: If the file cannot be written.
    """
    backend = "mlx" if isinstance(cache, list) else "torch"
    load_backend_module(backend).save_prompt_cache(file_name, cache, metadata)


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """``mlx_lm.models.cache.load_prompt_cache``; says in a sentence what is wrong with a file.

    Raises:
        InputError: If there is no such file, or it is broken or of another version.
    """
    return load_backend_module("mlx").load_prompt_cache(file_name, return_metadata)
