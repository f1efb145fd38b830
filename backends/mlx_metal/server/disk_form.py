"""A prompt cache as plain bytes: blocks of rows that only grow, and one block of all else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.enabled import enabled_state
from xkv.backends.mlx_metal.model.files import known_class
from xkv.backends.mlx_metal.model.going_back import reach, states_of
from xkv.backends.mlx_metal.model.identity import model_fingerprint, model_name
from xkv.backends.mlx_metal.model.native_state import NativeState
from xkv.backends.mlx_metal.model.prefill import lowrank_cache
from xkv.cache.state import FORMAT, growing_rows
from xkv.errors import InputError

mlx_cache = borrowed.module("mlx_lm.models.cache")

BLOCK_ROWS = 512
"""Tokens of a block; the last one of a conversation has fewer, and is written anew as it grows."""

_LEAVES = (mx.array, int, float, str, type(None))


class Piece(NamedTuple):
    """One array of a prompt cache, and in which blocks it is."""

    key: str
    """Its place in the tree of all layers' states, as ``tree_flatten`` calls it."""
    dtype: str
    shape: list[int]
    axis: int | None
    """The axis along which it is cut into blocks; None if it is whole in one."""
    part: int = 0
    """Which of the whole blocks that is."""


class Apart(NamedTuple):
    """A prompt cache taken apart. The arrays are views of memory that it goes on using."""

    form: dict[str, Any]
    """All but the numbers, for JSON: :func:`put_together` wants it back."""
    arrays: list[np.ndarray]

    def blocks(self) -> Iterator[list[np.ndarray]]:
        """Contents of each block, one array after the other."""
        for at in _cuts(_pieces(self.form)):
            yield [np.ascontiguousarray(x[cut]) for x, cut in zip(self.arrays, at, strict=True)]


def take_apart(caches: Sequence[Any]) -> Apart:
    """See a prompt cache as arrays of unsigned integers, without a copy.

    Another thread may read them: MLX writes into none of them while they are held.

    Raises:
        InputError: If it has layers of a kind that cannot be made again.
    """
    kinds = [type(cache).__name__ for cache in caches]
    for cache, kind in zip(caches, kinds, strict=True):
        if getattr(mlx_cache, kind, None) is not type(cache) and type(cache) is not XKVCache:
            raise InputError(f"layers of the kind {kind} cannot be written")
        if type(cache) is mlx_cache.ChunkedKVCache and hasattr(cache, "meta_state"):
            # made again it has forgotten how many tokens it has seen
            raise InputError(f"mlx-lm up to 0.31 does not give a {kind} back as it was")
    metas = [getattr(cache, "meta_state", None) for cache in caches]
    states = [cache.state for cache in caches]
    tree: dict[str, Any] = {"layers": states}
    if beside := [[state.n_tokens, *state.parts] for state in states_of(caches)]:
        tree["beside"] = beside
    rows: dict[int, tuple[int, int]] = {}
    for cache, state in zip(caches, states, strict=True):
        rows.update(_growing(cache, state))
    scalars, pieces, found = {}, [], []
    for key, leaf in _leaves(tree):
        if isinstance(leaf, mx.array):
            axis, n_rows = rows.get(id(leaf), (None, 0))
            shape = list(leaf.shape)
            if axis is not None:
                shape[axis] = n_rows
            # a copy that goes back is the same in many conversations
            part = 1 + int(key.split(".")[1]) if key.startswith("beside") else 0
            pieces.append(Piece(key, str(leaf.dtype).rpartition(".")[2], shape, axis, part))
            # of its own: what is written in place then leaves the old numbers where they are
            found.append(leaf.view(_unsigned(leaf.dtype.size)))
        else:
            scalars[key] = leaf
    mx.eval(found)
    arrays = []
    for piece, x in zip(pieces, found, strict=True):
        whole = np.array(x, copy=False)
        in_use = tuple(map(slice, piece.shape))
        arrays.append(whole.reshape(-1) if piece.axis is None else whole[in_use])
    form = {"kinds": kinds, "metas": metas, "scalars": scalars, "pieces": pieces}
    return Apart(form, arrays)


def put_together(form: dict[str, Any], blocks: Iterable[bytes]) -> list[Any]:
    """The prompt cache that :func:`take_apart` saw.

    Args:
        form: What it was, from JSON.
        blocks: In the order of :meth:`Apart.blocks`.

    Raises:
        InputError: If they do not belong together.
    """
    pieces = _pieces(form)
    arrays = [_empty(x) for x in pieces]
    for at, block in zip(_cuts(pieces), blocks, strict=True):
        start = 0
        for x, cut in zip(arrays, at, strict=True):
            part = x[cut]
            part[...] = np.frombuffer(block, part.dtype, part.size, start).reshape(part.shape)
            start += part.nbytes
        if start != len(block):
            raise InputError(f"a block of {start} bytes has {len(block)}")
    leaves = dict(form["scalars"])
    for piece in pieces:
        # one by one, so that nothing is there twice but one array
        whole = mx.array(arrays.pop(0).reshape(piece.shape)).view(getattr(mx, piece.dtype))
        mx.eval(whole)
        leaves[piece.key] = whole
    tree: Any = tree_unflatten(list(leaves.items()))
    with known_class():
        caches = [
            getattr(mlx_cache, kind).from_state(state, *([] if meta is None else [meta]))
            for kind, state, meta in zip(form["kinds"], tree["layers"], form["metas"], strict=True)
        ]
    cache = lowrank_cache(caches)
    if cache is not None:
        cache.beside = tuple(NativeState(*x[:1], x[1:]) for x in tree.get("beside", []))
    return caches


def back_to(caches: Sequence[Any], n_tokens: int) -> list[int] | None:
    """To which numbers of its tokens a prompt cache that has seen ``n_tokens`` can go back.

    Returns:
        None for any.
    """
    if reach(caches, n_tokens, 1):
        return None
    return [state.n_tokens for state in states_of(caches)]


def identity_of(models: Sequence[nn.Module | None], options: Sequence[Any] = ()) -> str:
    """A code of all that a conversation's numbers depend on beside its tokens.

    Args:
        models: The model, and the draft model.
        options: What else.
    """
    about = [FORMAT, version("mlx-lm"), list(options), *(_about(x) for x in models if x)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _about(model: nn.Module) -> list[Any]:
    parameters: Any = tree_flatten(model.parameters())
    dtypes = sorted({str(x.dtype) for _, x in parameters})
    enabled = enabled_state(model)
    if enabled is None:
        return [model_name(model), model_fingerprint(model), dtypes]
    plan, basis = enabled.plan, enabled.basis
    about = [plan.groups, asdict(plan.config), None if basis is None else basis.uid]
    return [model_name(model), enabled.fingerprint, dtypes, *about]


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Arrays and scalars of a tree by their keys.

    Raises:
        InputError: If the tree could not be made of them again.
    """
    leaves: Any = tree_flatten(tree)
    for _, leaf in leaves:
        if not isinstance(leaf, _LEAVES):
            raise InputError(f"a {type(leaf).__name__} cannot be written")
    if _skeleton(tree_unflatten(leaves)) != _skeleton(tree):
        raise InputError("empty states cannot be written")
    return leaves


def _skeleton(tree: Any) -> Any:
    """A tree without its leaves."""
    if isinstance(tree, dict):
        return {name: _skeleton(x) for name, x in tree.items()}
    return [_skeleton(x) for x in tree] if isinstance(tree, list | tuple) else None


def _growing(cache: Any, state: Any) -> dict[int, tuple[int, int]]:
    """By arrays' ids: the axis along which later tokens only add rows, and how many are used."""
    if isinstance(cache, XKVCache):
        found = growing_rows(state, cache.layer.cache.backend)
        return {id(state[place]): rows for place, rows in found.items()}
    if type(cache) is mlx_cache.KVCache:
        return {id(x): (2, cache.offset) for x in state[:2]}
    return {}


def _pieces(form: dict[str, Any]) -> list[Piece]:
    return [Piece(*piece) for piece in form["pieces"]]


def _cuts(pieces: Sequence[Piece]) -> Iterator[list[tuple[slice, ...]]]:
    """What of each array is in each block: rows, then what is not cut."""
    n_rows = max((x.shape[x.axis] for x in pieces if x.axis is not None), default=0)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        yield [(slice(0),) if x.axis is None else (*[slice(None)] * x.axis, rows) for x in pieces]
    for part in sorted({x.part for x in pieces if x.axis is None}):
        yield [(slice(None if x.axis is None and x.part == part else 0),) for x in pieces]


def _unsigned(size: int) -> Any:
    return {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[size]


def _empty(piece: Piece) -> np.ndarray:
    """Where an array comes together, flat if it is not cut."""
    shape = [math.prod(piece.shape)] if piece.axis is None else piece.shape
    return np.empty(shape, f"u{getattr(mx, piece.dtype).size}")
