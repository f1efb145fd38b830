"""Several conversations in one batch of mlx-lm's: each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

import xkv
from tests.architectures import MODEL_FILES, NOT_BUILT, build
from xkv import InputError
from xkv.backends.mlx_metal.model.batch import XKVBatch
from xkv.backends.mlx_metal.model.enabled import enabled_state, lowrank_cache, prefill_prompt
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.checks.invariants import broken_invariants

OPTIONS: dict[str, Any] = {"group_size": 2, "window": 16, "max_tail": 16}
EXACT: dict[str, Any] = {**OPTIONS, "rank_k": "full", "rank_v": "full"}
LENGTHS = (200, 37, 90, 5, 151)
PROMPTS = [np.random.default_rng(n).integers(3, 250, n).tolist() for n in LENGTHS]
N_TOKENS, STEP_SIZE = 24, 64
BROKEN = {
    "afm7": "rotates as if padding were tokens",
    "gemma2": "makes its mask for one sequence",
    "gpt_bigcode": "counts positions of one sequence",
    "longcat_flash_ngram": "looks before the beginning of short sequences",
    "minimax_m3_vl": "cuts blocks where padding begins",
    "nemotron-nas": "has layers whose caches stay empty",
    "phi3small": "makes its mask for one sequence",
}
"""What of mlx-lm's own cannot batch sequences of unequal lengths, with the full cache neither."""


@pytest.fixture
def enabled(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    name, options = request.param
    model = build(name)
    xkv.enable(model, **options)
    yield model
    xkv.disable(model)


Tokens = list[tuple[int, mx.array]]


def alone(model: nn.Module, prompt: list[int], n_tokens: int = N_TOKENS) -> Tokens:
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=n_tokens,
        prompt_cache=make_prompt_cache(model),
        prefill_step_size=STEP_SIZE,
    )
    return [(int(token), logprobs) for token, logprobs in steps]


def together(model: nn.Module, n_tokens: int = N_TOKENS) -> tuple[list[Tokens], list[Any]]:
    """The answers to :data:`PROMPTS`, of which the last two come when others have begun."""
    batches = BatchGenerator(model, max_tokens=n_tokens, prefill_step_size=STEP_SIZE)
    uids = batches.insert(PROMPTS[:3])
    answers: dict[int, Tokens] = {}
    caches = {}
    while True:
        responses = batches.next_generated()
        if not responses:
            return [answers[uid] for uid in uids], [caches[uid] for uid in uids]
        for response in responses:
            answers.setdefault(response.uid, []).append((response.token, response.logprobs))
            if response.finish_reason is not None:
                caches[response.uid] = response.prompt_cache
        if len(uids) == 3 and len(answers[uids[0]]) == 4:
            uids += batches.insert(PROMPTS[3:])


def assert_same(found: Tokens, wanted: Tokens, atol: float = 4e-4) -> None:
    assert [token for token, _ in found] == [token for token, _ in wanted]
    for (_, mine), (_, its) in zip(found, wanted, strict=True):
        assert mx.allclose(mine, its, rtol=0, atol=atol).item()


CASES = [
    ("llama", {**OPTIONS, "rank_k": 24, "rank_v": 32, "budget": 40}),
    ("llama", {**OPTIONS, "rank_k": 24, "rank_v": 32, "attention": "exact"}),
    ("qwen3", {**OPTIONS, "compression": 2, "basis": "prompt", "sinks": 2}),
    ("gpt_oss", {**OPTIONS, "rank_k": 24, "rank_v": 32, "budget": 40}),
    ("deepseek_v3", {**OPTIONS, "rank_k": 12, "rank_v": 12}),
    ("deepseek_v32", EXACT),
    ("gemma3_text", {**OPTIONS, "rank_k": 24, "rank_v": 32}),
    ("gemma3n", EXACT),
    ("jamba", EXACT),
]


@pytest.mark.parametrize("enabled", CASES, indirect=True, ids=lambda case: case[0])
def test_tokens_are_those_of_each_conversation_alone(enabled: nn.Module) -> None:
    found, caches = together(enabled)
    for prompt, answer, cache in zip(PROMPTS, found, caches, strict=True):
        assert_same(answer, alone(enabled, prompt))
        held = lowrank_cache(cache)
        assert held is not None and broken_invariants(held) == []
        assert {x.offset for x in flatten(cache) if hasattr(x, "offset")} == {
            len(prompt) + N_TOKENS
        }


@pytest.mark.parametrize("name", [x for x in MODEL_FILES if x not in NOT_BUILT])
def test_every_architecture_is_batched_right_or_refused(name: str) -> None:
    model = build(name)
    try:
        xkv.enable(model, **EXACT)
    except InputError:
        pytest.skip("has no full KV cache")
    try:
        enabled = enabled_state(model)
        assert enabled is not None
        if not all(hasattr(x, "merge") for x in make_prompt_cache(model)):
            pytest.skip("mlx-lm does not batch its caches")
        assert (enabled.why_not_batched is not None) == (name in BROKEN)
        prompts = [PROMPTS[2], PROMPTS[3]]
        batches = BatchGenerator(model, max_tokens=2, prefill_step_size=STEP_SIZE)
        if name in BROKEN:
            with pytest.raises(InputError, match="cannot be in one batch of this model"):
                batches.insert(prompts)
            return
        uids = batches.insert(prompts)
        steps = [{x.uid: x for x in batches.next_generated()} for _ in range(2)]
        for uid, prompt in zip(uids, prompts, strict=True):
            found = [(step[uid].token, step[uid].logprobs) for step in steps]
            # measured: 4e-5 at most, and 1.3e-3 for one
            assert_same(found, alone(model, prompt, 2), 5e-3 if name == "muse_spark" else 4e-4)
    finally:
        xkv.disable(model)


PLAIN = [("qwen3", {**OPTIONS, "rank_k": 24, "rank_v": 32})]


@pytest.mark.parametrize("enabled", PLAIN, indirect=True)
def test_a_batch_shares_what_does_not_change_and_leaves_its_originals(enabled: nn.Module) -> None:
    caches = make_prompt_cache(enabled)
    prefill_prompt(enabled, caches, mx.array(PROMPTS[0]), STEP_SIZE)
    # tokens that come one by one are stored
    enabled(mx.array([[7]]), cache=caches)
    cache = lowrank_cache(caches)
    assert cache is not None and all(group.is_compressed for group in cache.groups)
    batch = [layer.merge([layer, layer]) for layer in caches]
    for token in range(40):
        enabled(mx.array([[token + 3], [token + 4]]), cache=batch)
    assert {layer.offset for layer in caches} == {len(PROMPTS[0]) + 1}
    assert broken_invariants(cache) == []
    first = batch[0].members[0].layer.cache
    assert {id(x.layer.cache) for layer in batch for x in layer.members[:1]} == {id(first)}
    mine, its = first.groups[0].keys, cache.groups[0].keys
    assert mine is not None and its is not None and mine.basis is its.basis


@pytest.mark.parametrize("enabled", [("qwen3", EXACT)], indirect=True)
def test_padding_is_never_kept(enabled: nn.Module) -> None:
    prompts = PROMPTS[1:4]
    caches = [make_prompt_cache(enabled) for _ in prompts]
    batch = [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    for layer in batch:
        layer.prepare(lengths=list(map(len, prompts)), right_padding=padding)
    rows = mx.array([[*p, *[0] * n] for p, n in zip(prompts, padding, strict=True)])
    for start in range(0, longest, 32):
        enabled(rows[:, start : start + 32], cache=batch)
    for layer in batch:
        layer.finalize()
    assert batch[0].offset.tolist() == list(map(len, prompts))
    got = enabled(mx.array([[9]] * len(prompts)), cache=batch)[:, -1]
    for number, prompt in enumerate(prompts):
        want = enabled(mx.array([[*prompt, 9]]), cache=None)[0, -1]
        assert mx.linalg.norm(got[number] - want) < 1e-4 * mx.linalg.norm(want)
    left = [layer.merge([layer, layer]) for layer in make_prompt_cache(enabled)]
    for layer in left:
        layer.prepare(left_padding=[0, 3])
    logits = enabled(mx.array([[5, 6, 7, 8], [0, 0, 0, 8]]), cache=left)[:, -1]
    assert left[0].offset.tolist() == [4, 1]
    assert mx.allclose(logits[1], enabled(mx.array([[8]]))[0, -1], atol=1e-4).item()


@pytest.mark.parametrize("enabled", PLAIN, indirect=True)
def test_batch_generate_returns_caches_that_go_on(enabled: nn.Module, loaded: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 6, "return_prompt_caches": True}
    first = batch_generate(enabled, loaded[1], PROMPTS[:2], **options)
    again = batch_generate(
        enabled, loaded[1], [[5, 6], [7]], prompt_caches=first.caches, max_tokens=4
    )
    for number, more in enumerate(([5, 6], [7])):
        caches = make_prompt_cache(enabled)
        tokens: list[int] = []
        for prompt, n_tokens in ((PROMPTS[number], 6), (more, 4)):
            steps = generate_step(
                mx.array(prompt), enabled, max_tokens=n_tokens, prompt_cache=caches
            )
            tokens = [int(token) for token, _ in steps]
        assert again.texts[number] == loaded[1].decode(tokens)


@pytest.mark.parametrize("enabled", PLAIN, indirect=True)
def test_what_cannot_be_in_one_batch_is_refused(enabled: nn.Module) -> None:
    cache = make_prompt_cache(enabled)[0]
    with pytest.raises(InputError, match="cannot be in one batch: make all with the enabled"):
        cache.merge([cache, KVCache()])
    prefilled = make_prompt_cache(enabled)
    prefill_prompt(enabled, prefilled, mx.array(PROMPTS[1]), STEP_SIZE)
    batch = prefilled[0].merge([prefilled[0]])
    assert isinstance(batch, XKVBatch)
    with pytest.raises(InputError, match="cannot be padded on the left"):
        batch.prepare(left_padding=[1])
    other = build("llama")
    xkv.enable(other, **OPTIONS, rank_k=24, rank_v=32)
    try:
        with pytest.raises(InputError, match="made by another model"):
            BatchGenerator(other).insert([[5, 6]], caches=[prefilled])
    finally:
        xkv.disable(other)
