"""Prompt caches of models with states and windows go back to where messages began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

import xkv
from tests.architectures import build
from xkv.backends.mlx_metal.model import going_back
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.enabled import enabled_state, prefill_prompt
from xkv.backends.mlx_metal.model.going_back import MAX_STATES, SHARE, cuts, keep_states, states_of
from xkv.backends.mlx_metal.model.memory import cache_text, dense_bytes
from xkv.backends.mlx_metal.model.native_state import is_native, native_copy
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server.budget import PromptCache, arrays_held
from xkv.backends.mlx_metal.server.need import RequestBytes

OPTIONS = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 8, "max_tail": 8}
BEGIN = 255
"""Begins a message."""
MODELS = ["qwen3_5", "gpt_oss", "gemma3", "jamba", "falcon_h1", "gemma4"]
"""The last takes no prompt layer by layer."""


def message(seed: int, n_tokens: int) -> list[int]:
    words = np.random.default_rng(seed).integers(3, 250, n_tokens - 1)
    return [BEGIN, *words.tolist()]


SYSTEM, USER, GO = message(0, 90), message(1, 60), message(2, 3)


@pytest.fixture
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    # tiny models' states are large beside their few tokens
    monkeypatch.setattr(going_back, "SHARE", 10.0)
    model = build(request.param)
    xkv.enable(model, **OPTIONS)
    enabled_state(model).boundaries = frozenset([BEGIN])
    yield model
    xkv.disable(model)


class Chat:
    """Answers out of one server's prompt cache, each compared with that of a fresh one."""

    def __init__(self, model: nn.Module, max_size: int = 10) -> None:
        self.model = model
        self.kept = PromptCache(max_size)
        self.max_tokens = 5

    def tokens(self, prompt: list[int], cache: list[Any]) -> list[int]:
        options: Any = {"max_tokens": self.max_tokens, "prompt_cache": cache}
        steps = generate_step(mx.array(prompt), self.model, prefill_step_size=50, **options)
        return [int(token) for token, _ in steps]

    def ask(self, prompt: list[int], n_cached: range) -> list[int]:
        """The answer, for which so many tokens were in the cache."""
        cache, rest = self.kept.fetch_nearest_cache("model", prompt)
        assert len(prompt) - len(rest) in n_cached
        cache = cache or make_prompt_cache(self.model)
        answer = self.tokens(rest, cache)
        assert answer == self.tokens(prompt, make_prompt_cache(self.model))
        n_tokens = max(getattr(x, "offset", 0) for x in flatten(cache))
        self.kept.insert_cache("model", [*prompt, *answer][:n_tokens], cache)
        return answer


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_retries_edits_and_branches_go_on_from_where_they_differ(model: nn.Module) -> None:
    chat = Chat(model)
    prompt = [*SYSTEM, *USER, *GO]
    answer = chat.ask(prompt, range(1))
    # at most a few tokens of the message before are taken again
    assert chat.ask(prompt, range(len(prompt) - 20, len(prompt))) == answer
    chat.ask([*SYSTEM, *message(3, 30), *GO], range(len(SYSTEM), len(SYSTEM) + 1))
    before = [*prompt, *answer]
    chat.ask([*before, *message(4, 40), *GO], range(len(before) - 1, len(before) + 1))
    for length in (40, 50, 9):
        edited = [*before, *message(length, length), *GO]
        chat.ask(edited, range(len(before) - 1, len(before) + 1))
    # and of a branch, further on
    branch = [*SYSTEM, *message(3, 60), *GO]
    chat.ask(branch, range(len(SYSTEM), len(SYSTEM) + 1))
    chat.ask([*branch[:-3], *message(8, 30)], range(len(branch) - 25, len(branch)))
    # a template that leaves what was thought out of earlier turns
    without = [*prompt, 7, *message(5, 30), *GO]
    chat.ask(without, range(len(prompt) - 20, len(prompt) + 1))


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss"], indirect=True)
def test_a_message_too_short_to_be_cut_is_edited(model: nn.Module) -> None:
    # of one conversation, the last cache alone
    chat, prompt = Chat(model, max_size=1), [*SYSTEM, *USER, *GO]
    before = [*prompt, *chat.ask(prompt, range(1))]
    for seed in (4, 5, 6):
        chat.ask([*before, *message(seed, 9), *GO], range(len(before) - 1, len(before) + 1))


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss", "gemma4"], indirect=True)
def test_prompts_of_batches_are_copied_too(model: nn.Module) -> None:
    """``prefill_prompt`` is what batches take their prompts with."""
    chat, prompt = Chat(model), [*SYSTEM, *USER, *GO]
    cache = make_prompt_cache(model)
    prefill_prompt(model, cache, mx.array(prompt), 50)
    chat.kept.insert_cache("model", prompt, cache)
    chat.ask([*SYSTEM, *message(3, 30), *GO], range(len(SYSTEM), len(SYSTEM) + 1))


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss"], indirect=True)
def test_answers_do_not_write_into_copies(model: nn.Module) -> None:
    # no message begins in it: the copy is of its end, and tokens are written into windows in place
    chat, text = Chat(model), SYSTEM[1:]
    chat.ask(text, range(1))
    for _ in range(2):
        chat.ask(text, range(len(text) - 1, len(text)))
    # and one of an answer's end, that single tokens come after
    chat = Chat(model, max_size=1)
    chat.max_tokens = 30
    before = [*text, *chat.ask(text, range(1))]
    for token in (7, 8, 9):
        chat.ask([*before, token], range(len(before) - 1, len(before) + 1))


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss"], indirect=True)
def test_copies_are_counted_and_shared(model: nn.Module) -> None:
    chat, prompt = Chat(model), [*SYSTEM, *USER, *GO]
    chat.ask(prompt, range(1))
    first, second = (chat.kept.fetch_nearest_cache("model", [*prompt, 9])[0] for _ in range(2))
    states = states_of(first)
    assert [state.n_tokens for state in states] == [len(SYSTEM), len(prompt) - 1 - 17]
    assert all(state.nbytes > 0 for state in states)
    copies = {id(x): x.nbytes for state in states for x in state.arrays}
    held, layers = arrays_held(first), sum(x.nbytes for x in flatten(first))
    assert copies.items() <= held.items() and copies.items() <= arrays_held(second).items()
    assert sum(held.values()) == layers + sum(copies.values())
    assert f"{(layers + sum(copies.values())) / 1e6:.3f} MB held" in cache_text(first)
    chat.ask([*SYSTEM, *message(3, 30), *GO], range(1, len(prompt)))
    assert chat.kept.nbytes < 2 * layers + 2 * sum(copies.values())


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss"], indirect=True)
def test_a_request_is_estimated_with_states_and_copies(model: nn.Module) -> None:
    enabled, cache = enabled_state(model), make_prompt_cache(model)
    prefill_prompt(model, cache, mx.array(SYSTEM), 50)
    native = sum(x.nbytes for x in native_copies(cache))
    dense = native + sum(dense_bytes(x) for x in flatten(cache) if isinstance(x, XKVCache))
    with_copies = RequestBytes.of(enabled, 80, 10, True).cache
    enabled.boundaries = None
    without = RequestBytes.of(enabled, 80, 10, True).cache
    assert with_copies - without == min(MAX_STATES * native, int(SHARE * dense))
    assert without > dense


def native_copies(cache: list[Any]) -> list[mx.array]:
    copies = [native_copy(x) for x in flatten(cache) if is_native(x)]
    return [x for _, x in tree_flatten(copies) if isinstance(x, mx.array)]


@pytest.mark.parametrize("model", ["qwen3_5", "gpt_oss", "gemma4"], indirect=True)
def test_no_more_copies_than_a_cache_may_have(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model)
    prompt = [*SYSTEM, *(x for seed in range(20) for x in message(seed, 20))]
    cache = make_prompt_cache(model)
    chat.tokens(prompt, cache)
    # the first, and the last ones
    assert [x.n_tokens for x in states_of(cache)] == [90, *range(370, 471, 20), 489]
    for share in (0.5, 0.2, 0.0):
        monkeypatch.setattr(going_back, "SHARE", share)
        natives = [native_copy(x) for x in flatten(cache) if is_native(x)]
        keep_states(cache, {len(prompt): natives})
        held, dense = sum(x.nbytes for x in states_of(cache)), sum(map(dense_bytes, cache))
        assert held <= share * dense
        assert not held or states_of(cache)[0].n_tokens == 90


@pytest.mark.parametrize(
    ("n_tokens", "boundaries", "found"),
    [
        (16, [], []),
        (17, [], [17]),
        (100, [], [100]),
        (100, [0], [100]),
        (100, [0, 16], [100]),
        (100, [0, 17, 30, 34], [17, 34, 100]),
        (100, [50, 90], [50, 83]),
        (100, [70, 90], [70]),
        (100, [50, 100], [50, 100]),
        (40, [30], [23]),
        (33, [20], []),
        (1000, range(0, 1000, 50), [50, *range(700, 1000, 50), 1000]),
    ],
)
def test_cuts(n_tokens: int, boundaries: Any, found: list[int]) -> None:
    assert cuts(n_tokens, boundaries) == found


@pytest.mark.parametrize("model", ["gpt_oss"], indirect=True)
def test_a_copy_of_a_window_has_no_more_rows_than_it(model: nn.Module) -> None:
    cache = make_prompt_cache(model)
    model(mx.array([SYSTEM]), cache=cache)
    windows = [x for x in flatten(cache) if isinstance(x, RotatingKVCache)]
    assert windows and all(x.keys.shape[2] > x.max_size for x in windows)
    assert all(native_copy(x)["keys"].shape[2] == x.max_size for x in windows)


@pytest.mark.parametrize("model", ["qwen3_5"], indirect=True)
def test_nothing_is_copied_where_nobody_goes_back(model: nn.Module) -> None:
    enabled_state(model).boundaries = None
    cache = make_prompt_cache(model)
    Chat(model).tokens([*SYSTEM, *USER], cache)
    Chat(model).tokens(USER, cache)
    assert states_of(cache) == ()


@pytest.mark.parametrize("model", ["qwen3_5", "gemma4"], indirect=True)
def test_a_prompt_that_fails_leaves_no_copies(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, cache = Chat(model), make_prompt_cache(model)
    chat.tokens([*SYSTEM, *USER, *GO], cache)
    before = states_of(cache)

    def failing(done: int, total: int) -> None:
        if done > 60:
            raise InterruptedError

    prompt = mx.array([*message(6, 40), *message(7, 40), *GO])
    options: Any = {"prompt_cache": cache, "prompt_progress_callback": failing}
    with pytest.raises(InterruptedError):
        next(generate_step(prompt, model, **options))
    assert states_of(cache) == before


@pytest.mark.parametrize("model", ["gemma4"], indirect=True)
def test_progress_counts_the_whole_prompt(model: nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    prompt = [*SYSTEM, *USER, *GO]
    options: Any = {"prompt_progress_callback": lambda *step: seen.append(step)}
    next(generate_step(mx.array(prompt), model, **options))
    assert seen == sorted(seen) and seen[0][0] > 0
    assert {total for _, total in seen} == {len(prompt)} and seen[-1][0] == len(prompt)
