"""Language models of mlx-vlm, which has attention, caches and rotary embeddings of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.identity import model_name
from xkv.backends.mlx_metal.model.seam import Patch, attention_of
from xkv.errors import InputError

WHY_NOT = "mlx-vlm takes each part of a prompt through all layers"
"""Why prompts do not go layer by layer."""


def is_vlm(model: Any) -> bool:
    """Whether a model is mlx-vlm's, or a part of one."""
    return type(model).__module__.partition(".")[0] == "mlx_vlm"


def text_model(model: Any) -> Any:
    """The part of a model that is given prompt caches: of mlx-vlm's, the language model.

    Raises:
        InputError: If it has none.
    """
    if not is_vlm(model):
        return model
    found = getattr(model, "language_model", model)
    if not hasattr(found, "layers") and not hasattr(found, "make_cache"):
        raise InputError(
            f"{model_name(model)} of mlx-vlm has no language model with a KV cache to compress"
        )
    return found


@functools.cache
def attention() -> Patch:
    """The seam of mlx-vlm's models: see :mod:`xkv.backends.mlx_metal.model.seam`."""
    home = borrowed.module("mlx_vlm.models.base")
    return Patch(home, "scaled_dot_product_attention", attention_of)


def plain_caches(model: Any) -> tuple[type, ...]:
    """Classes of the full KV caches that a model makes beside mlx-lm's."""
    return (borrowed.module("mlx_vlm.models.cache").KVCache,) if is_vlm(model) else ()


def ropes(model: Any, n_caches: int) -> list[nn.Module | None]:
    """What rotates each cache's keys by three positions a token, None where nothing is known to."""
    kind = borrowed.module("mlx_vlm.models.rope_utils").MRoPERotaryEmbedding
    layers = getattr(model, "layers", [])
    if len(layers) != n_caches:
        return [None] * n_caches
    return [
        next((x for _, x in layer.named_modules() if isinstance(x, kind)), None) for layer in layers
    ]


@contextlib.contextmanager
def probing(model: Any) -> Iterator[None]:
    """A call inside reaches the seam of mlx-vlm, and leaves no positions on its model."""
    if not is_vlm(model):
        yield
        return
    items, attributes = dict(model), dict(vars(model))
    attention().install()
    try:
        yield
    finally:
        attention().remove()
        for now, before in ((model, items), (vars(model), attributes)):
            dict.clear(now)
            dict.update(now, before)
