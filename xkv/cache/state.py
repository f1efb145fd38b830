"""One layer's cache as a list of arrays, and back: the layout of a prompt cache file.

The only place that knows it. Each framework reads and writes the arrays with its own safetensors
functions, in the file layout of mlx-lm's prompt caches.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from xkv.cache.lowrank_cache import LayerCache, LowRankCache
from xkv.cache.row_buffer import RowBuffer
from xkv.cache.rows import LayerRows
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.packed import Packed, Part
from xkv.ops.recent import Recent
from xkv.ops.types import Array, DynamicNTKRope, Rope, RopeRun, RopeSpec
from xkv.store.model_basis import ModelBasis
from xkv.store.ranks import BitPlan, ModelPlan, RankPlan
from xkv.store.shapes import CacheShape, GroupShape
from xkv.store.store import Basis, Store

FORMAT = 6
"""Version of the layout below."""

LAYER_CLASS = "XKVCache"
"""What a file calls a layer of this layout."""

_BEGUN: weakref.WeakValueDictionary[str, LowRankCache] = weakref.WeakValueDictionary()
"""Caches that are being read: mlx-lm makes the layers of a file one by one."""

_PLANS: dict[str, Any] = {plan.__name__: plan for plan in (RankPlan, BitPlan, ModelPlan)}

_ROPES = {"fixed": RopeSpec, "dynamic": DynamicNTKRope}


_COUNTS = ("start", "n_segment")


def write_layer(layer: LayerCache, rope: Rope | None) -> list[Array]:
    """A layer's state: first a description in JSON as bytes, then the arrays that it names."""
    cache, rows, state = layer.cache, layer.rows, layer.group.state
    arrays: dict[str, Array] = {}
    bases: dict[str, list[list[int]]] = {}
    for name in ("keys", "values"):
        buffer, store = getattr(rows, name), getattr(state, name)
        if buffer.allocated is not None:
            arrays[name] = buffer.allocated
        if store is None:
            continue
        if layer.index == 0:
            arrays.update((f"{name}.latent.{i}", x) for i, x in enumerate(store.latent.arrays))
        if not store.basis.is_shared:
            basis = store.basis.layers[layer.index]
            bases[name] = [[x.bits, x.group_size] for x in basis.parts]
            arrays.update((f"{name}.basis.{i}", x) for i, x in enumerate(basis.arrays))
    if rows.recent is not None:
        arrays.update((f"recent.{i}", x) for i, x in enumerate(rows.recent))
    about = {
        "format": FORMAT,
        "backend": cache.backend.name,
        "cache": cache.uid,
        "groups": [list(indices) for indices in cache.indices],
        "config": asdict(cache.config),
        "shape": asdict(cache.known_shape) if cache.known_shape is not None else None,
        "n_dense_layers": cache.n_dense_layers,
        "fingerprint": cache.fingerprint,
        "is_streaming": cache.is_streaming,
        "notice": cache.notice,
        "unspent": cache.unspent,
        "plan": cache.ranks and [type(cache.ranks).__name__, asdict(cache.ranks)],
        "layer": [layer.number, layer.index],
        "retry_at": state.retry_at,
        "stores": {
            name: [store.total, store.lost, store.basis.bits]
            for name, store in (("keys", state.keys), ("values", state.values))
            if store is not None
        },
        "basis": cache.basis and cache.basis.uid,
        "rope": _write_rope(rope),
        "runs": [[run.n_rows, _write_rope(run.spec)] for run in rows.rope_runs],
        "rows": [[x.n_rows, x.reserved] for x in (rows.keys, rows.values)],
        **{name: getattr(rows, name) for name in _COUNTS},
        "bases": bases,
        "arrays": list(arrays),
    }
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8).copy()
    return [cache.backend.from_numpy(text), *arrays.values()]


def growing_rows(state: Sequence[Array], backend: Backend) -> dict[int, tuple[int, int]]:
    """Which arrays of a layer's state later tokens only add rows to.

    Args:
        state: From :func:`write_layer`.
        backend: Of its arrays.

    Returns:
        By the array's place in the state: the axis of its rows, and how many are in use. One that
        is cut to these is as good.
    """
    about = json.loads(backend.to_numpy(state[0]).tobytes())
    n_dense = {name: rows[0] for name, rows in zip(("keys", "values"), about["rows"], strict=True)}
    found = {}
    for place, name in enumerate(about["arrays"], 1):
        if ".latent." in name:
            found[place] = 1, about["n_segment"]
        elif name in n_dense and not about["n_segment"]:
            found[place] = 2, n_dense[name]
    return found


FindBasis = Callable[[Backend, "str | None", tuple[tuple[int, ...], ...], str], ModelBasis]
"""Finds a calibration by its model's fingerprint, its groups and its name."""


def read_layer(
    state: Sequence[Array], make_backend: Callable[[], Backend], find_basis: FindBasis
) -> tuple[LayerCache, Rope | None]:
    """The layer that :func:`write_layer` wrote, in its group; the first one begins a new cache.

    Args:
        state: Arrays of the reader's framework.
        make_backend: Called for a new cache.
        find_basis: Called for the calibration that it was made with.

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
        _BEGUN[about["cache"]] = cache = _read_cache(about, backend, find_basis)
    elif about["cache"] in _BEGUN:
        cache = _BEGUN[about["cache"]]
    else:
        raise InputError("the prompt cache is incomplete: its first layer is missing")
    layer = LayerCache(cache, group_index, index)
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


def _read_cache(about: dict[str, Any], backend: Backend, find_basis: FindBasis) -> LowRankCache:
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
    cache = LowRankCache(
        backend,
        XKVConfig(**about["config"]),
        about["groups"],
        about["n_dense_layers"],
        shape=shape,
    )
    for name in ("fingerprint", "is_streaming", "notice", "unspent"):
        setattr(cache, name, about[name])
    if about["basis"] is not None:
        cache.basis = find_basis(backend, about["fingerprint"], cache.indices, about["basis"])
    if about["plan"] is not None:
        kind, fields = about["plan"]
        cache.ranks = _PLANS[kind](**fields)
    return cache


def _fill(layer: LayerCache, about: dict[str, Any], arrays: dict[str, Array]) -> None:
    state, cache = layer.group.state, layer.cache
    fields: dict[str, Any] = {name: about[name] for name in _COUNTS}
    for name, (n_rows, reserved) in zip(("keys", "values"), about["rows"], strict=True):
        fields[name] = RowBuffer(arrays.get(name), n_rows, reserved)
        if name not in about["stores"]:
            continue
        total, lost, bits = about["stores"][name]
        store, basis = getattr(state, name), _basis(about, arrays, name)
        if layer.index == 0:
            latent = Latent(_numbered(arrays, f"{name}.latent"), tuple(bits))
            if not latent.arrays:
                raise InputError(f"the prompt cache is incomplete: it has no latent of the {name}")
            mine = Basis((), tuple(bits))
            if basis is None:
                mine = _shared(cache, layer.number, name, latent)
            store = Store(mine, latent, total, lost)
        elif store is None or (basis is not None and len(store.basis.layers) != layer.index):
            raise InputError("the prompt cache's layers are out of order or incomplete")
        if basis is not None:
            layers = (*store.basis.layers, basis)
            store = store._replace(basis=store.basis._replace(layers=layers))
        state = state._replace(**{name: store})
    recent = _numbered(arrays, "recent")
    rows = LayerRows(
        **fields,
        recent=Recent(*recent) if recent else None,
        rope_runs=tuple(RopeRun(n_rows, _read_rope(spec)) for n_rows, spec in about["runs"]),
    )
    state = state._replace(retry_at=about["retry_at"])
    layer.group.state = state.with_layer(layer.index, rows)


def _shared(cache: LowRankCache, number: int, name: str, latent: Latent) -> Basis:
    """The model's basis of a latent that comes from a file."""
    assert cache.basis is not None and isinstance(cache.ranks, ModelPlan)
    found = cache.basis.columns(number, cache.ranks.bits[number], latent.dtype)
    return found[name == "values"]


def _numbered(arrays: dict[str, Array], name: str) -> tuple[Array, ...]:
    return tuple(x for key, x in arrays.items() if key.startswith(f"{name}."))


def _basis(about: dict[str, Any], arrays: dict[str, Array], name: str) -> Packed | None:
    """A prompt's own basis in several parts, None where it is the model's."""
    if name not in about["bases"]:
        return None
    held = iter(_numbered(arrays, f"{name}.basis"))
    return Packed(
        tuple(
            Part(tuple(itertools.islice(held, 1 if bits == 16 else 3)), bits, group_size)
            for bits, group_size in about["bases"][name]
        )
    )


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
