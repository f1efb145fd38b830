"""Tries everything that can be done to a low-rank cache, in any order, against an exact twin.

:class:`CacheMachine` draws a configuration, then rules: prompts at once, in chunks and layer by
layer, replies, trims of any length, copies that go on beside each other, files, rounds of
speculative decoding, and factorizations that fail at any step. After every rule the invariants of
:mod:`xkv.checks.invariants` hold, and what a model would be answered is what the twin says.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.cache.checking import Checking
from tests.cache.settings import RANK, Setting, settings_of
from tests.cache.twin import Pair, failing, ordered, same_state, state_of
from xkv import InputError, load_backend
from xkv.cache.state import read_layer, write_layer


class CacheMachine(Checking, RuleBasedStateMachine):
    """See the module; subclasses say which backend."""

    backend_name: str

    def __init__(self) -> None:
        super().__init__()
        self.backend = load_backend(self.backend_name, kernels="off")
        self.pairs: list[Pair] = []

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
        loaded = [
            read_layer(state, lambda: self.backend, lambda *_: pair.cache.basis) for state in saved
        ]
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

    @precondition(lambda self: not self.setting.is_mla)
    @rule(data=st.data(), at=st.integers(1, 60))
    def interrupt_step(self, data: Any, at: int) -> None:
        """A call ends early, and the cache goes back to what it was before it."""
        pair = self.any_pair(data)
        before, rows = pair.cache.snapshot(), (list(pair.keys), list(pair.values))
        topics = pair.topics
        with failing(self.backend, at, KeyboardInterrupt):
            try:
                self.say(pair, 1)
            except KeyboardInterrupt:
                pair.cache.restore(before)
                pair.keys[:], pair.values[:], pair.topics = *rows, topics
        self.check(pair)
        self.say(pair, 1)
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
        self.check(pair)


class MLXCache(CacheMachine):
    backend_name = "mlx"


class TorchCache(CacheMachine):
    backend_name = "torch"


MACHINES = {"mlx": MLXCache, "torch": TorchCache}
