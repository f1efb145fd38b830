"""One layer's cache as a list of arrays, and back: the layout of a prompt cache file.

The only place that knows it. Each framework reads and writes the arrays with its own safetensors
functions, in the file layout of mlx-lm's prompt caches.
"""

from __future__ import annotations

import json
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from xkv.attention import RopeRun
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.layer_cache import LayerCache
from xkv.lowrank_cache import LowRankCache
from xkv.ranks import CacheShape, GroupShape, RankPlan
from xkv.rope import DynamicNTKRope, Rope, RopeSpec
from xkv.selection import Landmarks
from xkv.shared_factors import SharedFactors

if TYPE_CHECKING:
    from xkv.backend import Array, Backend

FORMAT = 2
"""Version of the layout below."""

LAYER_CLASS = "XKVCache"
"""What a file calls a layer of this layout."""

_BEGUN: weakref.WeakValueDictionary[str, LowRankCache] = weakref.WeakValueDictionary()
"""Caches that are being read: mlx-lm makes the layers of a file one by one."""

_ROPES = {"fixed": RopeSpec, "dynamic": DynamicNTKRope}


def write_layer(layer: LayerCache, rope: Rope | None) -> list[Array]:
    """A layer's state: first a description in JSON as bytes, then the arrays that it names."""
    group = layer.group
    cache, backend = group.cache, group.backend
    arrays: dict[str, Array] = {}
    for name in ("keys", "values"):
        buffer, factors = getattr(layer, name), getattr(group, name)
        if buffer.allocated is not None:
            arrays[name] = buffer.allocated
        if factors is not None:
            arrays.update(_write_factors(name, factors, layer.index))
    landmarks = layer.landmarks
    if landmarks is not None:
        arrays.update((f"landmarks.{i}", x) for i, x in enumerate(landmarks.held))
    about = {
        "format": FORMAT,
        "backend": backend.name,
        "cache": cache.uid,
        "groups": [list(indices) for indices in cache.indices],
        "config": asdict(cache.config),
        "shape": asdict(cache._shape) if cache._shape is not None else None,
        "fingerprint": cache.fingerprint,
        "ranks": cache.ranks and asdict(cache.ranks),
        "layer": [cache.groups.index(group), layer.index],
        "start": group.start,
        "errors": [factors.error if factors else None for factors in (group.keys, group.values)],
        "rope": _write_rope(rope),
        "runs": [[run.n_rows, _write_rope(run.spec)] for run in layer.rope_runs],
        "rows": [layer.keys.n_rows, layer.values.n_rows],
        "n_segment": layer.n_segment,
        "n_recent": layer.n_recent,
        "n_outlier_rows": layer.n_outlier_rows,
        "landmarks": landmarks and [landmarks.bits, landmarks.group_size, landmarks.chunk_size],
        "arrays": list(arrays),
    }
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8).copy()
    return [backend.from_numpy(text), *arrays.values()]


def read_layer(
    state: Sequence[Array], make_backend: Callable[[], Backend]
) -> tuple[LayerCache, Rope | None]:
    """The layer that :func:`write_layer` wrote, in its group; the first one begins a new cache.

    Args:
        state: Arrays of the reader's framework.
        make_backend: Called for a new cache.

    Raises:
        InputError: If the state is of another version, or layers are missing or out of order.
    """
    backend = make_backend()
    try:
        about = json.loads(backend.to_numpy(state[0]).tobytes())
        version = about["format"]
    except (AttributeError, IndexError, TypeError, KeyError, ValueError) as error:
        raise InputError("this is not the state of an xKV prompt cache") from error
    if version != FORMAT:
        raise InputError(
            f"the prompt cache has format {version}, and this version of xkv reads format "
            f"{FORMAT}: make it again"
        )
    if len(state) != len(about["arrays"]) + 1:
        raise InputError(
            f"the prompt cache is incomplete: a layer has {len(state) - 1} of "
            f"{len(about['arrays'])} arrays"
        )
    group_index, index = about["layer"]
    if group_index == index == 0:
        _BEGUN[about["cache"]] = cache = _read_cache(about, backend)
    elif about["cache"] in _BEGUN:
        cache = _BEGUN[about["cache"]]
    else:
        raise InputError("the prompt cache is incomplete: its first layer is missing")
    layer = cache.groups[group_index].layers[index]
    _fill(layer, about, dict(zip(about["arrays"], state[1:], strict=True)))
    return layer, _read_rope(about["rope"])


def check_config(mine: XKVConfig, its: XKVConfig) -> None:
    """Refuse a cache of another configuration, as one from a file may be.

    Raises:
        InputError: With what differs.
    """
    wanted, found = asdict(mine), asdict(its)
    differing = [
        f"{name}={found[name]} (here {wanted[name]})"
        for name in wanted
        if wanted[name] != found[name]
    ]
    if differing:
        raise InputError(
            f"the prompt cache was made with {', '.join(differing)}: "
            "use the same options, or make it again"
        )


def _write_factors(name: str, factors: SharedFactors, index: int) -> dict[str, Array]:
    """A layer's basis; the group's latents are with its first layer."""
    arrays = {f"{name}.basis": factors.bases[index]}
    if index == 0:
        arrays[f"{name}.latent"] = factors.latent
        if factors.recent is not None:
            arrays[f"{name}.recent"] = factors.recent
    return arrays


def _read_factors(
    name: str,
    arrays: dict[str, Array],
    before: SharedFactors | None,
    index: int,
    error: float,
) -> SharedFactors:
    """A group's factors with one more layer's basis."""
    if index == 0:
        before = SharedFactors(arrays[f"{name}.latent"], (), error, arrays.get(f"{name}.recent"))
    elif before is None or len(before.bases) != index:
        raise InputError("the prompt cache's layers are out of order or incomplete")
    return before._replace(bases=(*before.bases, arrays[f"{name}.basis"]))


def _read_cache(about: dict[str, Any], backend: Backend) -> LowRankCache:
    shape = about["shape"]
    if shape is not None:
        groups = tuple(GroupShape(**group) for group in shape.pop("groups"))
        shape = CacheShape(groups, **shape)
        is_mla = any(group.has_dense_values for group in groups)
        if is_mla and about["backend"] != backend.name:
            raise InputError(
                f"the prompt cache holds the latents of an MLA model, whose rotary keys are laid "
                f"out differently on {about['backend']}: make it again on {backend.name}"
            )
    cache = LowRankCache(backend, XKVConfig(**about["config"]), about["groups"], shape=shape)
    cache.uid = uuid.uuid4().hex
    cache.fingerprint = about["fingerprint"]
    cache.ranks = about["ranks"] and RankPlan(**about["ranks"])
    return cache


def _fill(layer: LayerCache, about: dict[str, Any], arrays: dict[str, Array]) -> None:
    group = layer.group
    for name, n_rows, error in zip(("keys", "values"), about["rows"], about["errors"], strict=True):
        buffer = getattr(layer, name)
        buffer.allocated, buffer.n_rows = arrays.get(name), n_rows
        if f"{name}.basis" in arrays:
            factors = _read_factors(name, arrays, getattr(group, name), layer.index, error)
            setattr(group, name, factors)
    group.start = about["start"]
    layer.n_segment, layer.n_recent = about["n_segment"], about["n_recent"]
    layer.n_outlier_rows = about["n_outlier_rows"]
    layer.rope_runs = [RopeRun(n_rows, _read_rope(spec)) for n_rows, spec in about["runs"]]
    if about["landmarks"] is not None:
        bits, group_size, chunk_size = about["landmarks"]
        held = [x for name, x in arrays.items() if name.startswith("landmarks.")]
        layer.landmarks = Landmarks(tuple(held[:-1]), bits, group_size, held[-1], chunk_size)


def _write_rope(rope: Rope | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    kind = next(name for name, cls in _ROPES.items() if type(rope) is cls)
    return {"kind": kind, **asdict(rope)}


def _read_rope(about: dict[str, Any] | None) -> Any:
    if about is None:
        return None
    options = {name: value for name, value in about.items() if name != "kind"}
    if "freqs" in options:
        options["freqs"] = tuple(options["freqs"])
    return _ROPES[about["kind"]](**options)
