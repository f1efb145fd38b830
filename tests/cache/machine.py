"""Tries everything that can be done to a low-rank cache, in any order, against an exact twin.

:class:`CacheMachine` draws a configuration, then rules: prompts at once, in chunks and layer by
layer, replies, trims of any length, copies that go on beside each other, files, rounds of
speculative decoding, and factorizations that fail at any step. After every rule the invariants of
:mod:`xkv.checks.invariants` hold, and what a model would be answered is what the twin says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from xkv import InputError, RopeSpec, XKVConfig, load_backend
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.state import read_layer, write_layer
from xkv.checks.invariants import broken_invariants
from xkv.ops.types import DynamicNTKRope
from xkv.store.shapes import CacheShape, GroupShape

RANK = 10
"""Of the rows of one topic: the bases hold them, whatever the bits."""
FAILING = ("evaluate", "own", "eigh", "cholesky", "quantize", "rope", "top_indices")
"""Operations that fail in turn."""
EXACT = 2e-4
"""Relative error of float32 factors of full rank, after many folds."""
LOOSE = 12.0
"""How much worse than factors made at once those that grew turn by turn may be, by their errors."""


@dataclass(frozen=True)
class Setting:
    """One model and one configuration."""

    config: XKVConfig
    groups: tuple[tuple[int, ...], ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    batch: int
    rope_name: str
    is_mla: bool
    is_streaming: bool

    @property
    def rope(self) -> Any:
        """What rotates keys."""
        if self.is_mla:
            return None
        return {
            "none": None,
            "halves": RopeSpec.standard(self.head_dim, 10_000.0),
            "partial": RopeSpec.standard(self.head_dim // 2, 10_000.0, traditional=True),
            "dynamic": DynamicNTKRope(self.head_dim, 10_000.0, 2.0, 100),
        }[self.rope_name]

    @property
    def n_layers(self) -> int:
        return sum(map(len, self.groups))

    @property
    def is_exact(self) -> bool:
        return self.config.rank_k == "full"

    def cache(self, backend: Any) -> LowRankCache:
        """A new cache."""
        groups = tuple(
            GroupShape(len(group), self.n_kv_heads, self.head_dim, self.head_dim, self.is_mla)
            for group in self.groups
        )
        shape = CacheShape(groups, 4) if self.is_mla else None
        cache = LowRankCache(backend, self.config, self.groups, shape=shape)
        cache.is_streaming = self.is_streaming
        return cache


@st.composite
def settings_of(draw: Any) -> Setting:
    """Every mode, with sizes small enough for hundreds of sequences."""
    head_dim = draw(st.sampled_from((64, 64, 80, 96, 120, 128, 256)))
    n_kv_heads = draw(st.sampled_from((1, 2))) if head_dim <= 128 else 1
    groups = draw(st.sampled_from((((0, 1),), ((0,), (1, 2)), ((0, 2), (1, 3)), ((0,),))))
    is_mla = draw(st.sampled_from((False,) * 7 + (True,)))
    chunk_size = draw(st.sampled_from((1, 4, 8)))
    size: dict[str, Any] = draw(
        st.sampled_from(
            (
                {"rank_k": "full", "rank_v": "full"},
                {"rank_k": "full", "rank_v": "full"},
                {"rank_k": RANK, "rank_v": RANK},
                {"compression": 2.0},
                {"compression": 3.0},
                {"compression": 1.5, "latent_bits": 16},
            )
        )
    )
    config = XKVConfig(
        groups=groups,
        **size,
        sinks=draw(st.sampled_from((0, 2, 4))),
        window=draw(st.sampled_from((0, 8, 16, None))),
        max_tail=draw(st.sampled_from((1, 16, 40))),
        attention="dense" if is_mla else draw(st.sampled_from(("auto", "dense", "selective"))),
        budget=chunk_size * draw(st.sampled_from((4, 8))),
        chunk_size=chunk_size,
        landmark_bits=draw(st.sampled_from((4, 8, 16))),
        outlier_chunks=draw(st.sampled_from((None, 0, 2))),
        weighting=draw(st.sampled_from(("off", "off", "norm", "attention"))),
    )
    return Setting(
        config,
        groups,
        n_kv_heads * draw(st.sampled_from((1, 3))),
        n_kv_heads,
        head_dim,
        draw(st.sampled_from((1, 1, 1, 2))),
        draw(st.sampled_from(("halves", "partial", "dynamic", "none"))),
        is_mla,
        draw(st.sampled_from((False, False, True))),
    )


@dataclass
class Pair:
    """A cache and what a full cache would hold: rows ``[B, n_kv_heads, L, head_dim]`` a layer."""

    cache: LowRankCache
    keys: list[np.ndarray]
    values: list[np.ndarray]
    topics: np.ndarray
    """What each token is about."""

    @property
    def n_tokens(self) -> int:
        return len(self.topics)


class Interrupted(Exception):
    """Stands in for whatever ends an operation."""


class CacheMachine(RuleBasedStateMachine):
    """See the module; subclasses say which backend."""

    backend_name: str

    def __init__(self) -> None:
        super().__init__()
        self.backend = load_backend(self.backend_name, kernels="off")
        self.pairs: list[Pair] = []
        self.files = 0

    # -- drawing rows

    @initialize(setting=settings_of(), seed=st.integers(0, 2**16))
    def begin(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.random = np.random.default_rng(seed)
        width = setting.n_layers * setting.n_kv_heads * setting.head_dim
        # rows are correlated across layers, which a group's joint factors need
        self.bases = self.random.standard_normal((2, 2, RANK, width)) / RANK**0.5
        shape = (setting.batch, setting.n_kv_heads, 0, setting.head_dim)
        empty = [np.zeros(shape, np.float32) for _ in range(setting.n_layers)]
        cache = setting.cache(self.backend)
        if setting.config.weighting == "attention":
            energy = np.ones((setting.n_kv_heads, setting.head_dim), np.float32)
            for layer in cache.layers.values():
                layer.rows = layer.rows._replace(output_energy=self.backend.from_numpy(energy))
        self.pairs.append(Pair(cache, empty, list(empty), np.zeros(0, int)))

    def draw_rows(self, n_rows: int, topic: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Un-rotated keys, and values, of new tokens in every layer."""
        s = self.setting
        weights = self.random.standard_normal((2, s.batch, n_rows, RANK))
        found = []
        flat = np.einsum("tbnr,trw->tbnw", weights, self.bases[topic])
        shape = (2, s.batch, n_rows, s.n_layers, s.n_kv_heads, s.head_dim)
        by_layer = flat.reshape(shape).transpose(3, 0, 1, 4, 2, 5).astype(np.float32)
        for keys, values in by_layer:
            found.append((np.ascontiguousarray(keys), np.ascontiguousarray(values)))
        return found

    def queries(self, n_rows: int) -> Any:
        s = self.setting
        size = (s.batch, s.n_heads, n_rows, s.head_dim)
        return self.backend.from_numpy(self.random.standard_normal(size).astype(np.float32))

    def spec(self, end: int) -> Any:
        return None if self.setting.rope is None else self.setting.rope.at(end)

    # -- doing things

    def take(self, pair: Pair, layer_idx: int, rows: Any, topic: int) -> None:
        """One layer takes tokens, in the cache and in its twin."""
        keys, values = rows
        layer = pair.cache.layers[layer_idx]
        spec = self.spec(layer.offset + keys.shape[2])
        rotated = self.backend.from_numpy(keys)
        if spec is not None:
            rotated = self.backend.rope(rotated, layer.offset, spec)
        layer.append(rotated, self.backend.from_numpy(values), spec)
        for kept, new in ((pair.keys, self.backend.to_numpy(rotated)), (pair.values, values)):
            kept[layer_idx] = np.concatenate([kept[layer_idx], new], axis=2)
        queries = self.queries(keys.shape[2])
        layer.watch(queries)
        if not self.setting.is_mla:
            self.check_attention(pair, layer_idx, queries)

    def say(self, pair: Pair, n_rows: int, topic: int = 0) -> None:
        """A call of the model."""
        for layer_idx, rows in enumerate(self.draw_rows(n_rows, topic)):
            self.take(pair, layer_idx, rows, topic)
        pair.topics = np.concatenate([pair.topics, np.full(n_rows, topic)])

    def any_pair(self, data: Any) -> Pair:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1), label="cache")]

    @rule(
        data=st.data(),
        n_rows=st.sampled_from((1, 1, 2, 3, 15, 16, 17, 31, 32, 40, 90, 200)),
        topic=st.sampled_from((0, 0, 0, 1)),
    )
    def append(self, data: Any, n_rows: int, topic: int) -> None:
        pair = self.any_pair(data)
        self.say(pair, n_rows, topic)
        self.check(pair)

    @rule(data=st.data(), n_rows=st.integers(1, 6))
    def reply(self, data: Any, n_rows: int) -> None:
        pair = self.any_pair(data)
        for _ in range(n_rows):
            self.say(pair, 1)
        self.check(pair)

    @rule(data=st.data(), n_rows=st.sampled_from((40, 120, 300)), n_chunks=st.integers(1, 3))
    def prompt_layer_by_layer(self, data: Any, n_rows: int, n_chunks: int) -> None:
        """As a prefill does that factors a group when its last layer is done."""
        pair = self.any_pair(data)
        if pair.cache.is_streaming:
            return
        ends = [n_rows * (i + 1) // n_chunks for i in range(n_chunks)]
        for layer_idx, (keys, values) in enumerate(self.draw_rows(n_rows, 0)):
            layer = pair.cache.layers[layer_idx]
            layer.reserve(n_rows)
            for start, end in zip((0, *ends), ends, strict=False):
                chunk = keys[:, :, start:end].copy(), values[:, :, start:end].copy()
                self.take(pair, layer_idx, chunk, 0)
            if layer.is_last_of_group:
                layer.settle()
        pair.topics = np.concatenate([pair.topics, np.zeros(n_rows, int)])
        self.check(pair)

    def forget(self, pair: Pair, n_tokens: int) -> None:
        n_kept = max(pair.n_tokens - n_tokens, 0)
        for layer in pair.cache.layers.values():
            assert layer.trim(n_tokens) == pair.n_tokens - n_kept
        pair.topics = pair.topics[:n_kept]
        for kept in (pair.keys, pair.values):
            kept[:] = [rows[:, :, :n_kept] for rows in kept]

    @rule(data=st.data(), share=st.floats(0, 1.05))
    def trim_far(self, data: Any, share: float) -> None:
        pair = self.any_pair(data)
        self.forget(pair, round(share * pair.n_tokens))
        self.check(pair)

    @rule(data=st.data(), n_tokens=st.integers(1, 40))
    def trim_near(self, data: Any, n_tokens: int) -> None:
        pair = self.any_pair(data)
        self.forget(pair, n_tokens)
        self.check(pair)

    @rule(data=st.data(), n_draft=st.integers(1, 8), accepted=st.integers(0, 8))
    def speculate(self, data: Any, n_draft: int, accepted: int) -> None:
        pair = self.any_pair(data)
        self.say(pair, n_draft + 1)
        self.forget(pair, max(n_draft - accepted, 0))
        self.check(pair)

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        """Two conversations with the same beginning go on beside each other."""
        pair = self.any_pair(data)
        before = state_of(pair.cache)
        twin = Pair(
            copy.deepcopy(pair.cache), list(pair.keys), list(pair.values), pair.topics.copy()
        )
        assert same_state(state_of(twin.cache), before)
        self.pairs.append(twin)

    @rule(data=st.data())
    def save_and_load(self, data: Any) -> None:
        pair = self.any_pair(data)
        saved = [write_layer(layer, self.setting.rope) for layer in ordered(pair.cache)]
        loaded = [read_layer(state, lambda: self.backend) for state in saved]
        again = loaded[0][0].cache
        assert all(layer.cache is again for layer, _ in loaded)
        assert all(rope == self.setting.rope for _, rope in loaded)
        assert same_state(state_of(again), state_of(pair.cache))
        pair.cache = again
        self.check(pair)

    @rule(
        data=st.data(),
        at=st.integers(1, 60),
        kind=st.sampled_from((KeyboardInterrupt, MemoryError)),
    )
    def interrupt(self, data: Any, at: int, kind: type[BaseException]) -> None:
        """An operation between two calls ends early; the cache is what it was."""
        pair = self.any_pair(data)
        before = state_of(pair.cache)
        with failing(self.backend, at, kind) as has_failed:
            try:
                pair.cache.settle()
            except kind:
                assert has_failed()
        if has_failed():
            # groups before the one that failed are done, it and later ones are as they were
            is_kept = [x is y for x, y in zip(before, state_of(pair.cache), strict=True)]
            assert is_kept == sorted(is_kept) and is_kept[-1]
        self.check(pair)
        pair.cache.settle()
        self.check(pair)

    @precondition(lambda self: not self.setting.is_streaming)
    @rule(data=st.data(), layer_idx=st.integers(0, 3), n_rows=st.sampled_from((20, 150)))
    def not_a_number(self, data: Any, layer_idx: int, n_rows: int) -> None:
        """Rows overflow, and are forgotten."""
        pair = self.any_pair(data)
        rows = self.draw_rows(n_rows, 0)
        keys, _ = rows[layer_idx % len(rows)]
        keys[0, 0, n_rows // 2, 3] = np.nan
        n_before = pair.n_tokens
        for index, (new_keys, new_values) in enumerate(rows):
            layer = pair.cache.layers[index]
            spec = self.spec(layer.offset + n_rows)
            layer.append(
                self.backend.from_numpy(new_keys), self.backend.from_numpy(new_values), spec
            )
            layer.watch(self.queries(n_rows))
        before = state_of(pair.cache)
        try:
            pair.cache.settle()
        except InputError as error:
            assert "NaN" in str(error)
            assert len(before) == len(state_of(pair.cache))
        offsets = {layer.offset for layer in pair.cache.layers.values()}
        assert offsets == {n_before + n_rows}
        for layer in pair.cache.layers.values():
            layer.trim(n_rows)
            # what was watched of a prompt is of the rows that are left, too
        self.check(pair)

    # -- checking

    def check(self, pair: Pair) -> None:
        """Invariants, and all rows against the twin's."""
        cache = pair.cache
        assert broken_invariants(cache) == []
        assert {layer.offset for layer in cache.layers.values()} == {pair.n_tokens}
        if not pair.n_tokens:
            return
        for layer_idx in cache.layers:
            for rows, exact in zip(
                cache.layers[layer_idx].dense(), (pair.keys, pair.values), strict=True
            ):
                got, want = self.backend.to_numpy(rows), exact[layer_idx]
                assert got.shape == want.shape and np.isfinite(got).all()
                error, allowed = row_error(got, want), self.allowed(pair)
                assert error <= allowed, (layer_idx, error, allowed, cache.groups[0].layers)

    def allowed(self, pair: Pair) -> float:
        """Relative error of rows that may come back."""
        if self.setting.is_exact:
            return EXACT
        if pair.topics.any():
            # the basis may have no room for a new topic, but it is never worse than nothing
            return 1.0
        errors = [x.error for group in pair.cache.groups for x in group.state.factors]
        return max(EXACT, LOOSE * max(errors, default=0.0), 0.05 * bool(errors))

    def check_attention(self, pair: Pair, layer_idx: int, queries: Any) -> None:
        """What the model is answered: attention over the rows that the layer gives back."""
        layer, s = pair.cache.layers[layer_idx], self.setting
        n_queries, offset = queries.shape[2], layer.offset
        scale = s.head_dim**-0.5
        seen = np.arange(offset - n_queries, offset)[:, None] >= np.arange(offset)
        mask = None if n_queries == 1 else self.backend.from_numpy(seen)
        got = self.backend.to_numpy(layer.attend(queries, scale, mask))
        if s.is_exact:
            keys, values = pair.keys[layer_idx], pair.values[layer_idx]
        else:
            keys, values = (self.backend.to_numpy(x) for x in layer.dense())
        attended = np.broadcast_to(seen, (s.batch, s.n_kv_heads, n_queries, offset))
        if layer.is_compressed and layer.landmarks is not None and n_queries == 1:
            attended = self.selected(pair, layer_idx, queries, scale)
            if not s.is_exact:
                keys, values = self.with_outliers(pair, layer_idx, keys, values)
        want = attention(self.backend.to_numpy(queries), keys, values, attended, scale)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
        assert error <= 2e-3, (error, layer.rows.n_segment, layer.rows.n_recent)

    def selected(self, pair: Pair, layer_idx: int, queries: Any, scale: float) -> np.ndarray:
        """Which rows a step attends to: all that are dense or recent, and the chosen chunks."""
        layer, backend = pair.cache.layers[layer_idx], self.backend
        rows = layer.rows
        assert rows.landmarks is not None
        size, start = rows.landmarks.chunk_size, rows.start
        # every row of the segment is in a chunk, or nothing could choose it
        assert rows.landmarks.n_chunks * size == rows.n_segment
        chunks = backend.to_numpy(
            backend.select_chunks(queries, rows.landmarks, self.setting.config.budget, scale)
        )
        attended = np.ones((*chunks.shape[:2], 1, layer.offset), bool)
        attended[..., start : start + rows.n_segment] = False
        outliers = backend.to_numpy(rows.landmarks.is_outlier)
        for batch, head in np.ndindex(*chunks.shape[:2]):
            for chunk in (*chunks[batch, head], *np.nonzero(outliers[batch, head])[0]):
                first = start + int(chunk) * size
                attended[batch, head, 0, first : first + size] = True
        return attended

    def with_outliers(
        self, pair: Pair, layer_idx: int, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows with the outlier chunks' exact ones in their places."""
        rows = pair.cache.layers[layer_idx].rows
        assert rows.landmarks is not None
        size, start = rows.landmarks.chunk_size, rows.start
        outliers = self.backend.to_numpy(rows.landmarks.is_outlier)
        keys, values = keys.copy(), values.copy()
        for batch, head, chunk in zip(*np.nonzero(outliers), strict=True):
            at = (batch, head, slice(start + chunk * size, start + (chunk + 1) * size))
            keys[at], values[at] = pair.keys[layer_idx][at], pair.values[layer_idx][at]
        return keys, values


def row_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error of all rows."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6))


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, attended: np.ndarray, scale: float
) -> np.ndarray:
    """In float64: ``[B, n_heads, Lq, dim]``; ``attended`` is ``[B, n_kv_heads, Lq, L]``."""
    n_shared = queries.shape[1] // keys.shape[1]
    keys, values, attended = (np.repeat(x, n_shared, axis=1) for x in (keys, values, attended))
    scores = np.einsum("bhqd,bhkd->bhqk", queries.astype(np.float64), keys) * scale
    scores = np.where(attended, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), values)


def ordered(cache: LowRankCache) -> list[Any]:
    """Handles in the order in which a file has them."""
    return list(cache.layers.values())


def state_of(cache: LowRankCache) -> list[Any]:
    """Every group's state."""
    return [group.state for group in cache.groups]


def same_state(first: Any, second: Any) -> bool:
    """Whether two states are equal, their arrays bit by bit."""
    if first is second:
        return True
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    if hasattr(first, "__dataclass_fields__"):
        return all(
            same_state(getattr(first, name), getattr(second, name))
            for name in first.__dataclass_fields__
        )
    if hasattr(first, "shape") and hasattr(second, "shape"):
        if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
            return False
        return bool(((first == second) | (first != first) & (second != second)).all())
    return bool(first == second)


class failing:
    """The ``at``-th operation of a backend raises, while the block runs."""

    def __init__(self, backend: Any, at: int, kind: type[BaseException]) -> None:
        self.backend, self.left, self.kind = backend, at, kind
        self.has_failed = False

    def __enter__(self) -> Callable[[], bool]:
        for name in FAILING:
            vars(self.backend)[name] = self._wrapped(getattr(self.backend, name))
        return lambda: self.has_failed

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if not self.left:
                self.has_failed = True
                raise self.kind("the operation was ended")
            return original(*args, **kwargs)

        return operation

    def __exit__(self, *exc: object) -> None:
        for name in FAILING:
            del vars(self.backend)[name]


class MLXCache(CacheMachine):
    backend_name = "mlx"


class TorchCache(CacheMachine):
    backend_name = "torch"


MACHINES = {"mlx": MLXCache, "torch": TorchCache}
