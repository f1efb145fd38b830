"""A prompt goes in beside answers that run: nobody waits for the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.generate import GenerationBatch

import xkv
from tests.architectures import build
from tests.mlx_metal.server_loop import OPTIONS, PROMPTS, Loop, alone, failures
from xkv.backends.mlx_metal.model.enabled import enabled_state
from xkv.backends.mlx_metal.server import batches as batches_module

N_TOKENS = 100
LONG = PROMPTS[0]
STEP_SIZE = 32
N_CHUNKS = -(-(len(LONG) - 1) // STEP_SIZE)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    built = build("qwen3")
    xkv.enable(built, **OPTIONS)
    yield built
    xkv.disable(built)


class Clock:
    """What a step of the answers takes, and a chunk of a layer."""

    def __init__(self) -> None:
        self.now = self.step = self.chunk = 1.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batches_module, "time", clock)
    kind = GenerationBatch
    original = kind.next

    def next_step(batch: Any) -> Any:
        clock.now += clock.step
        return original(batch)

    monkeypatch.setattr(kind, "next", next_step)
    return clock


@pytest.fixture
def loop(model: nn.Module, clock: Clock) -> Loop:
    """An answer that runs, and a prompt of which one chunk is in."""
    loop = Loop(model, PROMPTS[1:2], N_TOKENS)
    batch = loop.batches._prompt_batch
    on_progress = batch.on_progress

    def told(*args: int) -> None:
        clock.now += clock.chunk
        on_progress(*args)

    batch.on_progress = told
    loop.run(4)
    assert loop.lengths() == [2]
    loop.insert(LONG)
    loop.run(1)
    assert len(progress(loop)) == 1
    return loop


def progress(loop: Loop, number: int = 1) -> list[Any]:
    """What the client of a request was told of its prompt so far."""
    return [x for x in list(loop.answers[number]._queue.queue) if isinstance(x, tuple)]


def test_a_token_comes_after_each_chunk_of_a_layer(loop: Loop, model: nn.Module) -> None:
    while not loop.prompts_done[1:]:
        before = loop.lengths()[0], len(progress(loop))
        loop.run(1)
        assert loop.lengths()[0] == before[0] + 1
        assert len(progress(loop)) <= before[1] + 1
    assert len(progress(loop)) == N_CHUNKS * len(model.layers)
    loop.run()
    wanted = [alone(model, prompt, N_TOKENS) for prompt in (PROMPTS[1], LONG)]
    assert list(loop.tokens.values()) == wanted


def test_answers_take_no_more_than_half_of_the_time(loop: Loop, clock: Clock) -> None:
    clock.step = 3.5
    loop.run(1)
    before = len(progress(loop))
    loop.run(1)
    assert len(progress(loop)) - before == 4


def test_nobody_to_wait_for_and_the_prompt_goes_in_at_once(model: nn.Module, clock: Clock) -> None:
    loop = Loop(model, PROMPTS[:1], N_TOKENS)
    loop.run(1)
    assert len(progress(loop, 0)) == N_CHUNKS * len(model.layers)


def test_a_client_that_leaves_while_its_prompt_rests(loop: Loop, model: nn.Module) -> None:
    loop.answers[1].context._should_stop = True
    loop.run(1)
    assert len(failures(loop.answers[1])) == 1 and loop.batches._prefill is None
    loop.run()
    first, second = loop.tokens.values()
    assert (first, second) == (alone(model, PROMPTS[1], N_TOKENS), [])
    assert_nothing_runs(loop, model)


def test_a_client_that_leaves_while_another_ones_prompt_rests(loop: Loop, model: nn.Module) -> None:
    loop.answers[0].context._should_stop = True
    loop.run()
    ((tokens, cache),) = loop.kept
    assert cache[0].offset == len(tokens)
    assert list(loop.tokens.values())[1] == alone(model, LONG, N_TOKENS)
    assert_nothing_runs(loop, model)


def test_a_step_that_fails_while_a_prompt_rests(
    loop: Loop, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.fail_step(monkeypatch)
    assert_nothing_runs(loop, model)
    uid = loop.insert(LONG)
    loop.run()
    assert loop.tokens[uid] == alone(model, LONG, N_TOKENS)


def test_a_batch_that_ends_while_a_prompt_rests(loop: Loop, model: nn.Module) -> None:
    loop.batches.close()
    assert_nothing_runs(loop, model)


def assert_nothing_runs(loop: Loop, model: nn.Module) -> None:
    enabled: Any = enabled_state(model)
    assert loop.batches._prefill is None and not enabled.layers._running
