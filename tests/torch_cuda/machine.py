"""Tries everything that a caller of transformers can do to a cache, in any order.

Models are tiny, factors of full rank, and every call's logits are those of a plain
``DynamicCache`` that was treated alike.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import xkv
from tests.cache.twin import failing, same_state
from tests.torch_cuda.failing_model import Interrupted, failing_model, state_of
from tests.torch_models import make_model
from xkv import InputError
from xkv.checks.invariants import broken_invariants

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    # PyTorch's experts know no float64
    "deepseek_v3": {"first_k_dense_replace": 5},
    "gemma3": {},
}
"""Plain, MLA, and sliding windows beside full attention."""
EXACT = 1e-6
"""Relative error of logits in float64."""
STEP_SIZE = 40
KINDS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
LENGTHS = st.sampled_from((2, 5, 16, 17, 33, 60, 120))


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """A model with our attention function, and the same one as it comes."""
    ours, plain = (make_model(name, torch.float64, **MODELS[name]) for _ in range(2))
    return ours, plain


@dataclass
class Pair:
    """A cache, its twin, and the tokens that both have seen."""

    cache: Any
    twin: Any
    tokens: torch.Tensor
    mask: torch.Tensor

    @property
    def n_rows(self) -> int:
        return self.tokens.shape[1]


class TransformersCache(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        name=st.sampled_from(tuple(MODELS)),
        batch=st.sampled_from((1, 1, 2)),
        is_padded=st.booleans(),
        attention=st.sampled_from(("exact", "exact", "auto")),
        max_tail=st.sampled_from((1, 16, 40)),
        window=st.sampled_from((0, 8, 16)),
        sinks=st.sampled_from((0, 4)),
        seed=st.integers(0, 2**16),
    )
    def begin(self, name: str, batch: int, is_padded: bool, seed: int, **options: Any) -> None:
        self.model, self.plain = models(name)
        self.batch, self.is_padded = batch, is_padded and batch > 1
        self.is_exact = options["attention"] == "exact"
        self.random = torch.Generator().manual_seed(seed)
        cache = xkv.torch_cache(
            self.model, rank_k="full", rank_v="full", group_size=2, budget=32, **options,
        )  # fmt: skip
        empty = torch.zeros(batch, 0, dtype=torch.long)
        cache.activate_past_recording()
        self.pairs = [Pair(cache, self.make_twin(), empty, empty)]

    def make_twin(self) -> Any:
        twin = transformers.DynamicCache(config=self.plain.config)
        twin.activate_past_recording()
        return twin

    # -- calls

    def draw(self, pair: Pair, n_rows: int) -> None:
        """More tokens, padded on the left where the batch is; both sides have yet to see them."""
        new = torch.randint(3, 200, (len(pair.tokens), n_rows), generator=self.random)
        mask = torch.ones_like(new)
        if self.is_padded and n_rows > 1 and (not pair.n_rows or n_rows % 2):
            row = int(torch.randint(len(new), (1,), generator=self.random))
            mask[row, : n_rows // 2] = 0
        pair.tokens = torch.cat([pair.tokens, new], 1)
        pair.mask = torch.cat([pair.mask, mask], 1)

    def arguments(self, pair: Pair, start: int, end: int) -> dict[str, torch.Tensor]:
        """Of a call that brings the rows from ``start`` to ``end``."""
        given = {"input_ids": pair.tokens[:, start:end]}
        if self.is_padded:
            positions = (pair.mask.cumsum(-1) - 1).clamp(min=0)
            given |= {
                "attention_mask": pair.mask[:, :end],
                "position_ids": positions[:, start:end],
            }
        return given

    def call(self, pair: Pair, start: int, end: int) -> torch.Tensor:
        return self.model(**self.arguments(pair, start, end), cache=pair.cache).logits

    def compare(self, pair: Pair, got: torch.Tensor, start: int) -> None:
        """Logits ``[B, L, vocabulary]`` of the last rows, of those from ``start`` on."""
        end = pair.n_rows
        want = self.plain(**self.arguments(pair, start, end), cache=pair.twin).logits
        n_rows = got.shape[1]
        is_token = pair.mask[:, -n_rows:].bool()
        got, want = got[is_token], want[:, -n_rows:][is_token]
        assert got.isfinite().all()
        if self.is_exact:
            assert (got - want).norm() <= EXACT * want.norm()
        self.check(pair)

    def check(self, pair: Pair) -> None:
        cache = pair.cache
        assert cache.get_seq_length() == pair.n_rows
        for i, sequence in enumerate(cache.sequences):
            assert broken_invariants(sequence) == []
            n_tokens = int(pair.mask[i].sum()) if len(cache.sequences) > 1 else pair.n_rows
            assert {x.offset for x in sequence.layers.values()} == {n_tokens}
        for layer in cache.layers:
            assert layer.get_seq_length() == pair.n_rows

    def say(self, pair: Pair, n_rows: int) -> None:
        start = pair.n_rows
        self.draw(pair, n_rows)
        self.compare(pair, self.call(pair, start, pair.n_rows), start)

    def pair(self, data: Any) -> Pair:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1), label="cache")]

    # -- rules

    @rule(data=st.data(), n_rows=LENGTHS)
    def prompt(self, data: Any, n_rows: int) -> None:
        self.say(self.pair(data), n_rows)

    @rule(data=st.data(), n_rows=st.sampled_from((90, 140)))
    def prompt_in_chunks(self, data: Any, n_rows: int) -> None:
        pair = self.pair(data)
        start = pair.n_rows
        self.draw(pair, n_rows)
        starts = range(start, pair.n_rows, STEP_SIZE)
        got = [self.call(pair, i, min(i + STEP_SIZE, pair.n_rows)) for i in starts]
        self.compare(pair, torch.cat(got, 1), start)

    @rule(data=st.data(), n_rows=st.sampled_from((30, 90, 140)))
    def prompt_layer_by_layer(self, data: Any, n_rows: int) -> None:
        pair = self.pair(data)
        start = pair.n_rows
        self.draw(pair, n_rows)
        self.prefill(pair)
        self.compare(pair, self.call(pair, pair.n_rows - 1, pair.n_rows), start)

    def prefill(self, pair: Pair) -> None:
        mask = pair.mask if self.is_padded else None
        xkv.torch_prefill(
            self.model, pair.cache, pair.tokens, attention_mask=mask, step_size=STEP_SIZE
        )

    @rule(data=st.data(), n_rows=st.integers(1, 12))
    def reply(self, data: Any, n_rows: int) -> None:
        pair = self.pair(data)
        start = pair.n_rows
        for _ in range(n_rows):
            self.draw(pair, 1)
        got = [self.call(pair, i, i + 1) for i in range(start, pair.n_rows)]
        self.compare(pair, torch.cat(got, 1), start)

    @precondition(lambda self: self.model is models("llama")[0] and not self.is_padded)
    @rule(data=st.data(), n_rows=st.integers(1, 20))
    def reply_of_a_decoder(self, data: Any, n_rows: int) -> None:
        pair = self.pair(data)
        start = pair.n_rows
        self.draw(pair, n_rows)
        decode = xkv.torch_decoder(self.model, pair.cache)
        got = [decode(pair.tokens[:, i : i + 1]).clone() for i in range(start, pair.n_rows)]
        self.compare(pair, torch.stack(got, 1), start)

    def forget(self, pair: Pair, n_rows: int) -> None:
        """Crop both; layers that have not kept their past refuse, and nothing changes."""
        before = state_of(pair.cache)
        try:
            pair.cache.crop(-n_rows)
        except InputError as error:
            assert "has not kept" in str(error)
            assert same_state(state_of(pair.cache), before)
            return
        n_left = max(pair.n_rows - n_rows, 0)
        pair.tokens, pair.mask = pair.tokens[:, :n_left], pair.mask[:, :n_left]
        if n_left:
            pair.twin.crop(-n_rows)
        else:
            pair.twin = self.make_twin()
        self.check(pair)

    @rule(data=st.data(), n_draft=st.integers(1, 8), n_wrong=st.integers(0, 8))
    def speculate(self, data: Any, n_draft: int, n_wrong: int) -> None:
        pair = self.pair(data)
        self.say(pair, n_draft + 1)
        self.forget(pair, min(n_wrong, n_draft))

    @rule(data=st.data(), share=st.floats(0, 1.05))
    def edit(self, data: Any, share: float) -> None:
        pair = self.pair(data)
        self.forget(pair, round(share * pair.n_rows))

    @precondition(lambda self: len(self.pairs) < 2)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        self.pairs.append(copy.deepcopy(self.pair(data)))

    @precondition(lambda self: not self.is_padded)
    @rule(data=st.data())
    def save_and_load(self, data: Any) -> None:
        pair = self.pair(data)
        if not pair.n_rows:
            return
        with tempfile.TemporaryDirectory() as folder:
            name = str(Path(folder) / "talk.safetensors")
            xkv.save_prompt_cache(name, pair.cache)
            pair.cache = xkv.load_torch_cache(self.model, name)
        pair.cache.activate_past_recording()
        self.check(pair)

    @rule(data=st.data(), is_twice=st.booleans())
    def choose_sequences(self, data: Any, is_twice: bool) -> None:
        pair = self.pair(data)
        rows = torch.arange(len(pair.tokens)).flip(0)
        if is_twice:
            rows = rows[:1].repeat(len(rows))
        for each in (pair.cache, pair.twin):
            each.batch_select_indices(rows)
        pair.tokens, pair.mask = pair.tokens[rows], pair.mask[rows]
        self.check(pair)

    @rule(
        data=st.data(),
        n_rows=st.sampled_from((1, 5, 90)),
        at=st.integers(1, 80),
        kind=st.sampled_from(KINDS),
        is_prefill=st.booleans(),
    )
    def interrupt(
        self, data: Any, n_rows: int, at: int, kind: type[BaseException], is_prefill: bool
    ) -> None:
        """A call ends early, wherever; what it brought has not been."""
        pair = self.pair(data)
        start, tokens, mask = pair.n_rows, pair.tokens, pair.mask
        # what is due between calls is done before one begins, and may stay done
        for sequence in pair.cache.sequences:
            sequence.settle()
        before = state_of(pair.cache)
        self.draw(pair, n_rows)
        has_failed = False
        with failing_model(self.model, at), failing(pair.cache.backend, at, kind):
            try:
                if is_prefill:
                    self.prefill(pair)
                    self.call(pair, pair.n_rows - 1, pair.n_rows)
                else:
                    self.call(pair, start, pair.n_rows)
            except (Interrupted, kind, InputError):
                has_failed = True
        if not has_failed:
            self.plain(**self.arguments(pair, start, pair.n_rows), cache=pair.twin)
            self.check(pair)
            return
        n_seen = pair.cache.get_seq_length()
        assert n_seen in (start, pair.n_rows - 1 if is_prefill else start)
        pair.cache.forget_failed_call()
        if n_seen == start:
            pair.tokens, pair.mask = tokens, mask
            assert same_state(state_of(pair.cache), before)
            self.check(pair)
            return
        # the prefill was done, and the last token's call failed
        self.compare(pair, self.call(pair, n_seen, pair.n_rows), start)
