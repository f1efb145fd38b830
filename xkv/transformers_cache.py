"""Compressed caches for transformers' models, in one line."""

from __future__ import annotations

from typing import Any

from xkv.backend import load_backend_module
from xkv.config import XKVConfig


def torch_cache(model: Any, config: XKVConfig | None = None, **options: Any) -> Any:
    """An empty compressed cache for a transformers model.

    ``model.generate(input_ids, cache=xkv.torch_cache(model))`` (``past_key_values=`` before
    transformers 5.24), batches with left padding too. From then on the model's attention function
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
        InputError: If the device runs out of memory: the model is as before, the cache is empty.
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
