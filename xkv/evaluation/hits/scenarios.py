"""What happens to a cache between a conversation and a question."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from xkv.cache.lowrank_cache import LayerCache
from xkv.config import DECODE_TOKENS
from xkv.evaluation.hits.conversation import Exchange, Talk
from xkv.evaluation.prefix import Prefix
from xkv.ops.loading import load_backend_module
from xkv.planning.language_model import LanguageModel

SCENARIOS = "fresh", "file", "edited", "folded"

_ROWS = "prefix_keys", "prefix_values", "keys", "values"

Layers = Sequence[Any]
"""Of a :class:`xkv.evaluation.methods.method.Conversation`."""


def play(scenario: str, model: LanguageModel, layers: Layers, talk: Talk) -> Layers:
    """Layers after a scenario; those given are used up.

    Args:
        scenario: ``fresh`` does nothing; ``file`` saves the cache and loads it again; ``edited``
            answers a message and takes both back; ``folded`` says so much that the tail is moved
            into what is compressed, twice and more.
        model: The model.
        layers: After the document and the opening.
        talk: What is said.
    """
    if scenario == "file":
        return through_file(model, layers)
    if scenario == "edited":
        before = layers[0].offset
        say(model, layers, talk.edited, 1)
        forget(layers, layers[0].offset - before)
    if scenario == "folded":
        for exchange in talk.later:
            say(model, layers, exchange, 1)
    return layers


def branched(layers: Layers) -> Layers:
    """Layers that go on from the same tokens and leave those given as they are."""
    memo: dict[int, Any] = {}
    return [
        copy.deepcopy(layer, memo) if isinstance(layer, LayerCache) else copy.copy(layer)
        for layer in layers
    ]


def say(model: LanguageModel, layers: Layers, exchange: Exchange, turn: int) -> None:
    """Take a message and a reply up; the reply comes as short calls, as tokens that are drawn."""
    message, reply = exchange
    model.forward([model.question_tokens(message, "", turn=turn)], layers, last_only=True)
    tokens = model.encode(reply)
    for start in range(0, len(tokens), DECODE_TOKENS):
        model.forward([tokens[start : start + DECODE_TOKENS]], layers, last_only=True)


def forget(layers: Layers, n_tokens: int) -> None:
    """Take the last tokens back."""
    for layer in layers:
        if isinstance(layer, LayerCache):
            layer.trim(n_tokens)
        else:
            n_left = layer.keys.shape[-2] - n_tokens
            layer.keys, layer.values = layer.keys[..., :n_left, :], layer.values[..., :n_left, :]


def through_file(model: LanguageModel, layers: Layers) -> Layers:
    """Layers from a file that these were saved in: ours as users' are, plain rows as they are."""
    compressed = {i: layer for i, layer in enumerate(layers) if isinstance(layer, LayerCache)}
    plain = {i: layer for i, layer in enumerate(layers) if i not in compressed}
    with tempfile.TemporaryDirectory() as folder:
        if compressed:
            path = str(Path(folder, "cache.safetensors"))
            next(iter(compressed.values())).cache.fingerprint = model.fingerprint
            compressed = _FILES[model.backend.name](path, model, compressed)
        loaded = {**compressed, **_rows_through_file(Path(folder, "rows"), model, plain)}
    return [loaded[index] for index in range(len(layers))]


def _rows_through_file(
    path: Path, model: LanguageModel, layers: dict[int, Prefix]
) -> dict[int, Prefix]:
    """Layers of plain rows."""
    backend = model.backend
    rows = {
        f"{index}.{name}": backend.to_numpy(getattr(layer, name)).copy()
        for index, layer in layers.items()
        for name in _ROWS
    }
    save_file(rows, path)
    loaded = load_file(path)
    found = {}
    for index, layer in layers.items():
        found[index] = copy.copy(layer)
        for name in _ROWS:
            array = backend.xp.astype(backend.from_numpy(loaded[f"{index}.{name}"]), model.dtype)
            setattr(found[index], name, array)
    return found


def _mlx_file(
    path: str, model: LanguageModel, layers: dict[int, LayerCache]
) -> dict[int, LayerCache]:
    module = load_backend_module("mlx")
    caches = [module.XKVCache(layer, model.ropes[index]) for index, layer in layers.items()]
    module.save_prompt_cache(path, caches)
    loaded = module.load_prompt_cache(path)
    return {index: cache.layer for index, cache in zip(layers, loaded, strict=True)}


def _torch_file(path: str, model: Any, layers: dict[int, LayerCache]) -> dict[int, LayerCache]:
    module = load_backend_module("torch")
    cache = module.torch_cache(model.model, next(iter(layers.values())).cache.config)
    for index, layer in layers.items():
        cache.layers[index].parts = [layer]
    module.save_prompt_cache(path, cache)
    loaded = module.load_torch_cache(model.model, path)
    return {index: loaded.layers[index].parts[0] for index in layers}


_FILES = {"mlx": _mlx_file, "torch": _torch_file}
