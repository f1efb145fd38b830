"""Prompt caches in files: mlx-lm's functions, made safe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.cache.whole_file import whole_file
from xkv.errors import InputError

mlx_cache = borrowed.module("mlx_lm.models.cache")


def save_prompt_cache(
    file_name: str, cache: Sequence[Any], metadata: dict[str, str] | None = None
) -> None:
    """Save a prompt cache, compressed or not, as ``mlx_lm.models.cache.save_prompt_cache`` does.

    The file is written beside its place and renamed, so that an older one survives a failure.

    Args:
        file_name: A ``.safetensors`` file.
        cache: One cache a layer.
        metadata: Strings to keep with it.

    Raises:
        InputError: If the file cannot be written, with the reason.
    """
    path = Path(file_name)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")  # as mx.save_safetensors does
    n_bytes = sum(layer.nbytes for layer in flatten(cache) if isinstance(layer, XKVCache))
    with whole_file(path, n_bytes, (RuntimeError,)) as beside:
        mlx_cache.save_prompt_cache(beside, list(cache), metadata or {})


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """Load a prompt cache, compressed or not, as ``mlx_lm.models.cache.load_prompt_cache`` does.

    Args:
        file_name: What :func:`save_prompt_cache`, or mlx-lm, wrote.
        return_metadata: Also return the metadata.

    Returns:
        One cache a layer, or a pair of that and the metadata.

    Raises:
        InputError: If the file is missing, broken, or of another version.
    """
    try:
        with known_class():
            cache, metadata = mlx_cache.load_prompt_cache(file_name, return_metadata=True)
        mx.eval([layer.state for layer in cache])
    except InputError as error:
        raise InputError(f"{file_name}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"there is no prompt cache file {file_name}") from error
    # what a truncated or foreign file can lead to in mlx-lm's reader
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        if not Path(file_name).exists():
            raise InputError(f"there is no prompt cache file {file_name}") from error
        raise InputError(f"{file_name} is no prompt cache, or is incomplete") from error
    return (cache, metadata) if return_metadata else cache


@contextlib.contextmanager
def known_class() -> Iterator[None]:
    """mlx-lm looks a cache's class up among its own."""
    name, before = XKVCache.__name__, getattr(mlx_cache, XKVCache.__name__, None)
    setattr(mlx_cache, name, XKVCache)
    try:
        yield
    finally:
        if before is None:
            delattr(mlx_cache, name)
