"""The server's batch: what one request does is never another's affair."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import xkv
from tests.architectures import build
from tests.mlx_metal.server_loop import (
    N_TOKENS,
    OPTIONS,
    PROMPTS,
    Loop,
    alone,
    failures,
    new_answers,
)
from tests.serving import Server, float32_model
from xkv.backends.mlx_metal.model import generation
from xkv.backends.mlx_metal.server import generator as generator_module
from xkv.backends.mlx_metal.server.budget import PromptCache
from xkv.backends.mlx_metal.server.errors import ClientGone
from xkv.backends.mlx_metal.server.generator import Generator
from xkv.backends.mlx_metal.server.need import RequestBytes
from xkv.tiny import make_document


@pytest.fixture
def model() -> Iterator[nn.Module]:
    built = build("qwen3")
    xkv.enable(built, **OPTIONS)
    yield built
    xkv.disable(built)


def test_every_request_gets_what_it_gets_alone(model: nn.Module) -> None:
    loop = Loop(model)
    loop.run()
    assert list(loop.tokens.values()) == [alone(model, prompt) for prompt in PROMPTS]
    assert sorted(loop.ended) == list(loop.tokens)
    assert loop.batches.answers == {} and loop.batches.arrays() == {}


def test_a_prompt_that_fails_ends_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = generation.prefill_prompt

    def failing(model: Any, caches: Any, tokens: mx.array, *args: Any) -> None:
        original(model, caches, tokens[:20], *args)
        if len(tokens) == len(PROMPTS[1]) - 1:
            raise MemoryError("no room")
        original(model, caches, tokens[20:], *args)

    want = [alone(model, prompt) for prompt in PROMPTS]
    monkeypatch.setattr(generation, "prefill_prompt", failing)
    loop = Loop(model)
    loop.run()
    first, second, third = loop.tokens.values()
    assert (first, second, third) == (want[0], [], want[2])
    assert [type(x) for x in failures(loop.answers[1])] == [MemoryError]
    assert failures(loop.answers[0]) == failures(loop.answers[2]) == []
    assert sorted(loop.ended) == list(loop.tokens)
    assert loop.kept == []


def test_a_step_that_fails_ends_all_and_the_next_ones_are_served(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(model)
    loop.run(6)
    loop.fail_step(monkeypatch)
    # some layers may have taken the token, and others not
    assert loop.kept == []
    assert sorted(loop.ended) == list(loop.tokens)
    uid = loop.insert(PROMPTS[0])
    loop.run()
    assert loop.tokens[uid] == alone(model, PROMPTS[0])


def test_a_request_that_is_left_is_kept_and_the_others_go_on(model: nn.Module) -> None:
    loop = Loop(model)
    loop.run(7)
    uids = list(loop.tokens)
    n_before = len(loop.tokens[uids[0]])
    assert 0 < n_before < N_TOKENS
    loop.answers[0].context._should_stop = True
    loop.run()
    assert len(loop.tokens[uids[0]]) == n_before
    assert sorted(loop.ended) == uids
    ((tokens, cache),) = loop.kept
    assert tokens[: len(PROMPTS[0]) + n_before] == PROMPTS[0] + loop.tokens[uids[0]]
    assert cache[0].offset == len(tokens)
    assert loop.tokens[uids[2]] == alone(model, PROMPTS[2])


def test_a_request_that_is_left_in_its_prefill_is_dropped(model: nn.Module) -> None:
    loop = Loop(model)
    loop.answers[1].context._should_stop = True
    loop.run()
    first, second, third = loop.tokens.values()
    assert (first, third) == (alone(model, PROMPTS[0]), alone(model, PROMPTS[2]))
    assert second == [] and loop.kept == []
    with pytest.raises(ClientGone):
        loop.batches.answers[9] = loop.answers[1]
        loop.batches._progress(9, 1, 2)


def test_a_request_waits_for_room_beside_those_that_run() -> None:
    cache = PromptCache(4, 1000)
    half = RequestBytes(600)
    assert cache.why_not(half) is None and cache.has_room(half)
    cache.needed, cache.active = lambda: RequestBytes(500), lambda: {1: 100}
    # it fits, but not now
    assert cache.why_not(half) is None and not cache.has_room(half)
    assert cache.has_room(RequestBytes(500))
    assert cache.report()["reserved_bytes"] == 500
    assert cache.why_not(RequestBytes(1001)) is not None


def test_an_error_of_mlx_lms_own_loop_ends_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator.__new__(Generator)
    running, ended = new_answers(), new_answers()
    ended.put(None)
    generator._open, generator._is_distributed = weakref.WeakSet([running, ended]), False
    errors = [IndexError("a token that the tokenizer lacks")]

    def loop(self: Any) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(generator_module.mlx_server.ResponseGenerator, "_generate", loop)
    assert generator._is_cut_off() and not generator._is_cut_off()
    assert [type(x) for x in failures(running)] == [IndexError]
    assert failures(ended) == []


def test_requests_that_do_not_fit_together_are_answered_one_after_the_other(
    tmp_path: Path,
) -> None:
    documents = [make_document(seed, 900) for seed in range(40, 44)]
    questions = [f"{x.text} {x.facts[0].question}" for x in documents]
    limit = 9_000_000
    flags = ["--compression", "8", "--prompt-cache-bytes"]
    model = str(float32_model(tmp_path / "model"))
    with Server("--model", model, *flags, str(limit)) as server:
        held, is_over = [], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.02):
                report = server.memory()
                held.append(report["held_bytes"])
                assert report["reserved_bytes"] <= limit

        watcher = ThreadPoolExecutor(1)
        watched = watcher.submit(watch)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(server.ask, questions))
        is_over.set()
        watched.result()
        texts = [answer.choices[0].message.content for answer in answers]
        assert texts == [document.facts[0].answer for document in documents]
        assert held and max(held) <= limit
