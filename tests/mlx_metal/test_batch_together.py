"""Sequences of a batch that are stored alike attend in one step, and get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

import xkv
from xkv.backends.mlx_metal.model import batch
from xkv.backends.mlx_metal.model.enabled import lowrank_cache
from xkv.cache import layer
from xkv.checks.invariants import broken_invariants
from xkv.tiny import CHECKPOINT_DIR, make_document

LENGTHS = (1200, 1195, 1190, 1185, 1180, 1400, 300)
"""Five that are planned alike, of which four fit in one step; one that is not; one kept dense."""
N_TOKENS = (24, 24, 9, 24, 24, 24, 24)


@pytest.fixture(scope="module")
def bundled() -> Iterator[tuple[Any, Any]]:
    model, tokenizer, *_ = mlx_lm.load(str(CHECKPOINT_DIR))
    xkv.enable(model, compression=8, groups=(tuple(range(len(model.layers))),))
    # the CPU multiplies 16-bit matrices slowly; the basis is that of the weights as they are
    model.set_dtype(mx.float32)
    yield model, tokenizer
    xkv.disable(model)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences in each step of several."""
    found: list[int] = []

    def spy(views: Any, *args: Any) -> mx.array:
        found.append(len(views))
        return layer.attend_together(views, *args)

    monkeypatch.setattr(batch, "attend_together", spy)
    return found


def test_each_gets_what_it_gets_alone(bundled: tuple[Any, Any], sizes: list[int]) -> None:
    model, tokenizer = bundled
    texts = (make_document(seed, 4000).text for seed in range(len(LENGTHS)))
    prompts = [tokenizer.encode(text)[:n] for text, n in zip(texts, LENGTHS, strict=True)]
    batches = BatchGenerator(model)
    uids = batches.insert(prompts, max_tokens=list(N_TOKENS))
    answers: dict[int, list[Any]] = {uid: [] for uid in uids}
    caches = {}
    while responses := batches.next_generated():
        for response in responses:
            answers[response.uid].append((response.token, response.logprobs))
            if response.finish_reason is not None:
                caches[response.uid] = response.prompt_cache
    # four together and the fifth alone, until the third leaves
    assert set(sizes) == {4}
    assert len(sizes) >= (max(N_TOKENS) - 1) * len(model.layers)
    for uid, prompt, n_tokens in zip(uids, prompts, N_TOKENS, strict=True):
        steps = generate_step(
            mx.array(prompt), model, max_tokens=n_tokens, prompt_cache=make_prompt_cache(model)
        )
        wanted = [(int(token), logprobs) for token, logprobs in steps]
        assert [token for token, _ in answers[uid]] == [token for token, _ in wanted]
        for (_, mine), (_, its) in zip(answers[uid], wanted, strict=True):
            # measured: 1.4e-5
            assert mx.allclose(mine, its, rtol=0, atol=1e-4).item()
        assert {x.offset for x in caches[uid]} == {len(prompt) + n_tokens}
        assert broken_invariants(lowrank_cache(caches[uid])) == []


def test_sequences_are_alike_by_plan_and_rows(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    tokens = tokenizer.encode(make_document(1, 6000).text)
    views, configs = [], []
    for n in (1200, 1150, 2300, 200, 1190, 1180, 1170):
        caches = make_prompt_cache(model)
        list(generate_step(mx.array(tokens[:n]), model, max_tokens=2, prompt_cache=caches))
        views.append(caches[0].layer.view)
        configs.append(caches[0].layer.cache.config)
    assert layer.alike(views, configs) == [[0, 1, 4, 5], [2], [3], [6]]
    exact = xkv.XKVConfig(compression=8, attention="exact")
    assert layer.alike(views, [exact, *configs[1:]]) == [[0], [1, 4, 5, 6], [2], [3]]
