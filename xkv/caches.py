"""Compressed prompt caches for mlx-lm and transformers, in one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.config import XKVConfig
from xkv.ops.loading import load_backend_module
from xkv.planning.report import Report


def enable(model: Any, config: XKVConfig | None = None, **options: Any) -> Report:
    """Give a model of ``mlx_lm.load`` or mlx-vlm compressed caches, until :func:`disable`.

    From then on every function of mlx-lm that makes a prompt cache for the model gets ours, and
    ``generate``, ``stream_generate`` and ``generate_step`` take prompts through the model layer by
    layer. A model that is enabled already gets the new configuration; caches that it made keep
    theirs.

    Args:
        model: From ``mlx_lm.load``; from ``mlx_vlm.load``, or the language model of one.
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
        cache: mlx-lm's list or tuple of caches, or what :func:`xkv.torch_cache` gave.
        metadata: Strings to keep with it.

    Raises:
        InputError: If the file cannot be written.
    """
    backend = "mlx" if isinstance(cache, Sequence) else "torch"
    load_backend_module(backend).save_prompt_cache(file_name, cache, metadata)


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """``mlx_lm.models.cache.load_prompt_cache``; says in a sentence what is wrong with a file.

    Raises:
        InputError: If there is no such file, or it is broken or of another version.
    """
    return load_backend_module("mlx").load_prompt_cache(file_name, return_metadata)


def torch_cache(model: Any, config: XKVConfig | None = None, **options: Any) -> Any:
    """An empty compressed cache for a transformers model.

    ``model.generate(input_ids, cache=xkv.torch_cache(model))`` (``past_key_values=`` before
    transformers 5.24), batches with left padding too; beams, several answers and drafts work. Rows
    are stored without gradients. From then on the model's attention function
    is ``"xkv"``, which is sdpa for every other cache; ``model.set_attn_implementation`` gives it
    another one.

    Args:
        model: From ``AutoModelForCausalLM``.
        config: How to compress; instead of it, keyword arguments of :class:`xkv.XKVConfig`.

    Returns:
        A ``Cache``. Its ``report`` says what becomes of each layer; those with sliding windows or
        a state instead of keys keep transformers' own.

    Raises:
        InputError: If nothing of the model can be compressed, its attention cannot be replaced, or
            an option is wrong.
    """
    if config is not None and options:
        raise TypeError("give either a config or its options, not both")
    return load_backend_module("torch").torch_cache(model, config or XKVConfig(**options))


def torch_prefill(model: Any, cache: Any, input_ids: Any, **options: Any) -> None:
    """Take all but the last token of a prompt through a model layer by layer.

    A group of layers is factored and freed when its last layer is done, so that the peak is about
    one group dense beside what is compressed. ``generate`` with the same ``input_ids`` and cache
    goes on from there. A model whose layers cannot be called alone gets the prompt in segments,
    compressed as they stream in, and a warning says so.

    Args:
        model: The model that the cache was made for.
        cache: From :func:`torch_cache`.
        input_ids: ``[B, L]``, tokens that the cache already holds included.
        options: ``attention_mask`` ``[B, L]``; ``step_size``, rows that a layer takes at a time
            (2048); ``on_progress``, called with tokens done and in all.

    Raises:
        InputError: If the device runs out of memory, or rows overflow. After any error, Ctrl-C
            included, model and cache are as before.
    """
    load_backend_module("torch").torch_prefill(model, cache, input_ids, **options)


def torch_decoder(model: Any, cache: Any) -> Any:
    """Decode one token after the other in steps of constant shapes.

    ``decoder(tokens)`` takes ``[B, 1]`` and returns logits ``[B, vocabulary]``, which the next step
    may overwrite. On CUDA the steps between two folds of the tail are replays of one graph; on the
    CPU they run as they are. The cache may be used otherwise in between.

    Args:
        model: The model that the cache was made for.
        cache: From :func:`torch_cache`, after the prompt but for its last token.

    Raises:
        InputError: If a layer's rows are not in the compressed cache, or the batch has padding.
    """
    return load_backend_module("torch").torch_decoder(model, cache)


def load_torch_cache(
    model: Any, file_name: str, config: XKVConfig | None = None, **options: Any
) -> Any:
    """Go on with a cache of :func:`xkv.save_prompt_cache`, whichever side wrote it.

    Args:
        model: The model that the cache was made for, in transformers.
        file_name: The file.
        config: What the cache has to be made with, or keyword arguments of
            :class:`xkv.XKVConfig`; with neither, whatever the file says.

    Raises:
        InputError: If the file is missing or broken, or of another model, configuration or version.
    """
    if config is not None and options:
        raise TypeError("give either a config or its options, not both")
    config = XKVConfig(**options) if options else config
    return load_backend_module("torch").load_torch_cache(model, file_name, config)
