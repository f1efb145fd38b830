"""Compressed caches in files, as mlx-lm lays out its prompt caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import install
from xkv.backends.torch_cuda.model.cache import plan_cache
from xkv.backends.torch_cuda.model.cache_layer import XKVLayer
from xkv.backends.torch_cuda.model.calls import watch_calls
from xkv.backends.torch_cuda.model.fingerprint import model_fingerprint
from xkv.backends.torch_cuda.model.native_state import read_native, write_native
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.state import LAYER_CLASS, check_config, read_layer, write_layer
from xkv.cache.whole_file import whole_file
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.types import RopeRun
from xkv.planning.basis_file import basis_of_cache
from xkv.planning.cache_plan import CachePlan


def save_prompt_cache(
    file_name: str, cache: XKVCache, metadata: dict[str, str] | None = None
) -> None:
    """Save a cache; an older file survives a failure.

    Args:
        file_name: A ``.safetensors`` file.
        cache: From :func:`xkv.torch_cache`, of one sequence or a batch without padding.
        metadata: Strings to keep with it.

    Raises:
        InputError: If it has padding or layers of another kind, or the file cannot be written.
    """
    path = Path(file_name)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")  # as mlx-lm does
    cache.forget_failed_call()
    if cache.padding.is_token is not None:
        raise InputError("a batch with padding cannot be saved: save a cache of each sequence")
    states, classes = _write(cache)
    # one copy of each: safetensors refuses tensors that share memory
    arrays = {
        f"{i}.{j}": x.detach().clone(memory_format=torch.contiguous_format)
        for i, state in enumerate(states)
        for j, x in enumerate(state)
    }
    about = {f"0.{name}": text for name, text in (metadata or {}).items()}
    about |= {f"1.{i}": name for i, name in enumerate(classes)}
    about["2.0"] = ""
    scalars = [name for name, x in arrays.items() if x.ndim == 0]
    for i, name in enumerate(scalars, start=1):
        about |= {f"2.{i}.0": name, f"2.{i}.1": "scalar"}
    n_bytes = sum(x.nbytes for x in arrays.values())
    with whole_file(path, n_bytes, (SafetensorError,)) as beside:
        save_file(arrays, beside, about)


def _write(cache: XKVCache) -> tuple[list[list[torch.Tensor]], list[str]]:
    """Each layer's state, and mlx-lm's name for it."""
    states, classes = [], []
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, XKVLayer):
            states.append([_unsigned(x) for x in write_layer(layer.parts[0], layer.rope)])
            classes.append(LAYER_CLASS)
            continue
        native = write_native(layer)
        if native is None:
            raise InputError(
                f"layer {layer_idx} keeps transformers' {type(layer).__name__}, which a cache file "
                "cannot hold"
            )
        classes.append(native[0])
        states.append(native[1])
    return states, classes


@dataclass(frozen=True)
class _File:
    """A prompt cache file's layers and what was written beside them."""

    classes: Sequence[str]
    states: Sequence[Sequence[torch.Tensor]]


def _read(file_name: str, device: torch.device) -> _File:
    try:
        with safe_open(file_name, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            # mlx-lm before 0.32 wrote the layers' class names third
            place = "1" if "1.0" in about else "2"
            classes: list[str] = []
            while f"{place}.{len(classes)}" in about:
                classes.append(about[f"{place}.{len(classes)}"])
            states: list[list[torch.Tensor]] = [[] for _ in classes]
            for name in sorted(file.keys(), key=lambda name: [int(x) for x in name.split(".")]):
                states[int(name.split(".")[0])].append(_signed(file.get_tensor(name).clone()))
    except FileNotFoundError as error:
        raise InputError(f"there is no prompt cache file {file_name}") from error
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise InputError(f"{file_name} is no prompt cache, or is incomplete") from error
    if LAYER_CLASS not in classes:
        raise InputError(f"{file_name} holds no compressed layer")
    return _File(classes, states)


def load_prompt_cache(
    model: PreTrainedModel, file_name: str, config: XKVConfig | None = None
) -> XKVCache:
    """Load a cache that :func:`save_prompt_cache`, or the MLX side, wrote.

    Args:
        model: The model that will go on with it.
        file_name: A ``.safetensors`` file.
        config: What the cache has to be made with; None takes the file's.

    Raises:
        InputError: If the file is missing or broken, or of another model, configuration or version.
    """
    backend = TorchBackend(model.device)
    file = _read(file_name, backend.device)
    try:
        compressed = {
            i: read_layer(state, lambda: backend, basis_of_cache)
            for i, (name, state) in enumerate(zip(file.classes, file.states, strict=True))
            if name == LAYER_CLASS
        }
        lowrank = next(iter(compressed.values()))[0].cache
        plan = plan_cache(model, config or lowrank.config)
        _bind(model, plan, lowrank, len(file.classes), compressed)
        check_config(plan.config, lowrank.config)
    except InputError as error:
        raise InputError(f"{file_name}: {error}") from error
    cache = XKVCache(model.config, plan, backend, sequences=[lowrank], basis=lowrank.basis)
    for layer, name, state in zip(cache.layers, file.classes, file.states, strict=True):
        if not isinstance(layer, XKVLayer):
            read_native(layer, name, state)
    install(model)
    watch_calls(model)
    return cache


def _bind(
    model: PreTrainedModel,
    plan: CachePlan,
    cache: LowRankCache,
    n_layers: int,
    compressed: dict[int, tuple[Any, Any]],
) -> None:
    """Refuse the cache of another model; its rotations become the model's own."""
    is_same = (
        n_layers == len(plan.probe.caches)
        and all(plan.probe.caches[i].shape is not None for i in compressed)
        and cache.fingerprint in (None, model_fingerprint(model))
        and all(_alike(plan.probe.caches[i].rope, rope) for i, (_, rope) in compressed.items())
    )
    if not is_same:
        raise InputError("the prompt cache was made by another model than the one it is for")
    for i, (layer, _) in compressed.items():
        # the same frequencies, as this framework rounds them
        rope = plan.probe.caches[i].rope
        spec = None if rope is None else rope.at(layer.offset)
        layer.rows = layer.rows._replace(rope_runs=(RopeRun(layer.offset, spec),))


def _alike(mine: Any, its: Any) -> bool:
    """Whether two rotations are the same but for the rounding of their frequencies."""
    if mine is None or its is None or type(mine) is not type(its):
        return mine is its
    same = (mine.dims, mine.traditional) == (its.dims, its.traditional)
    return same and np.allclose(mine.freqs, its.freqs, rtol=1e-4)


def _unsigned(x: torch.Tensor) -> torch.Tensor:
    """Packed integers, the only 32-bit ones here, as MLX holds them."""
    return x.view(torch.uint32) if x.dtype == torch.int32 else x


def _signed(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32) if x.dtype == torch.uint32 else x
