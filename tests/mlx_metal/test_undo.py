"""A prompt that fails, anywhere, leaves the cache as it was."""

from __future__ import annotations

import copy
import itertools

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step

import xkv
from tests.architectures import build
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError
from xkv.backends.mlx_metal import XKVCache
from xkv.backends.mlx_metal.model.prefill import Prefill
from xkv.backends.mlx_metal.model.snapshot import Snapshot
from xkv.cache import settling
from xkv.cache.lowrank_cache import LowRankCache

OPTIONS = {"rank_k": 24, "rank_v": 32, "group_size": 2, "window": 16, "max_tail": 16}
PROMPT = np.random.default_rng(0).integers(3, 250, 130).tolist()
MORE = np.random.default_rng(1).integers(3, 250, 70).tolist()

ERRORS = (KeyboardInterrupt, MemoryError, InputError)
POINTS = {
    "rows": (XKVCache, "update_and_fetch"),
    "chunk": (Prefill, "_report"),
    "group": (LowRankCache, "settle_group"),
    "factorization": (settling, "compressed"),
    "fold": (settling, "continued"),
    "attention": (XKVCache, "attend"),
    "native rows": (mlx_cache.RotatingKVCache, "update_and_fetch"),
    "last token": (mlx_cache, "create_attention_mask"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])
    return mlx_lm.load(str(folder))[0]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "hunyuan"])
def model(request, llama):
    """A plain model, one with sliding windows, and one that is not called layer by layer."""
    model = llama if request.param == "llama" else build(request.param)
    xkv.enable(model, **OPTIONS)
    yield model
    xkv.disable(model)


def greedy(model, cache, prompt) -> list[int]:
    options = {"prompt_cache": cache, "max_tokens": 4, "prefill_step_size": 30}
    return [token for token, _ in generate_step(mx.array(prompt), model, **options)]


def seen(model, cache) -> tuple[list[int], np.ndarray]:
    """Offsets and the next logits; the cache stays as it is."""
    logits = model(mx.array([[7]]), cache=copy.deepcopy(cache))
    return [x.offset for x in cache], np.array(logits.astype(mx.float32))


def first_token(model, cache, prompt) -> int:
    steps = generate_step(mx.array(prompt), model, prompt_cache=cache, prefill_step_size=30)
    return next(steps)[0]


class Fault:
    """Raises at one call of a function."""

    def __init__(self, monkeypatch, owner, name, error) -> None:
        self.at, self.n_calls = 0, 0
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.n_calls += 1
            if self.n_calls == self.at:
                raise error("planted")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    def calls_of(self, function) -> int:
        """How many calls something makes."""
        self.at, self.n_calls = 0, 0
        function()
        return self.n_calls


@pytest.mark.parametrize("turn", [1, 2])
def test_a_failed_prompt_leaves_the_cache_as_it_was(model, turn):
    cache, prompt = mlx_cache.make_prompt_cache(model), PROMPT
    if turn == 2:
        greedy(model, cache, PROMPT)
        prompt = MORE
    before = seen(model, cache)
    want = greedy(model, copy.deepcopy(cache), prompt)
    n_points = 0
    for (name, point), error in zip(POINTS.items(), itertools.cycle(ERRORS)):
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, *point, error)
            n_calls = fault.calls_of(lambda: first_token(model, copy.deepcopy(cache), prompt))
            n_points += n_calls > 0
            for at in {1, n_calls // 2, n_calls - 1, n_calls} & set(range(1, n_calls + 1)):
                fault.at, fault.n_calls = at, 0
                with pytest.raises(error, match="planted"):
                    first_token(model, cache, prompt)
                fault.at = 0
                after = seen(model, cache)
                assert after[0] == before[0], (name, at)
                np.testing.assert_array_equal(after[1], before[1], err_msg=f"{name} {at}")
    assert n_points >= 4
    assert greedy(model, cache, prompt) == want


def test_a_failed_prompt_with_a_draft_leaves_both_caches(llama, monkeypatch, tmp_path):
    draft = mlx_lm.load(str(write_checkpoint(tmp_path, ARCHITECTURES["qwen2"])))[0]
    for each in (llama, draft):
        xkv.enable(each, **OPTIONS)
    cache = [x for each in (llama, draft) for x in mlx_cache.make_prompt_cache(each)]

    def steps(cache) -> list[int]:
        options = {"prompt_cache": cache, "max_tokens": 2}
        found = speculative_generate_step(mx.array(PROMPT), llama, draft, **options)
        return [token for token, *_ in found]

    want = steps(copy.deepcopy(cache))
    fault = Fault(monkeypatch, XKVCache, "update_and_fetch", MemoryError)
    for at in (1, len(cache) // 2, len(cache), len(cache) + 3):
        fault.at, fault.n_calls = at, 0
        with pytest.raises(MemoryError):
            steps(cache)
        assert {x.offset for x in cache} == {0}
    fault.at = 0
    assert steps(cache) == want
    for each in (llama, draft):
        xkv.disable(each)


def test_not_a_number_in_a_prompt_is_told_and_forgotten(llama):
    xkv.enable(llama, **OPTIONS)
    cache = mlx_cache.make_prompt_cache(llama)
    layer = llama.layers[3].self_attn.k_proj
    weight = layer.weight
    layer.weight = weight * mx.nan
    with pytest.raises(InputError):
        greedy(llama, cache, PROMPT)
    layer.weight = weight
    assert {x.offset for x in cache} == {0}
    assert greedy(llama, cache, PROMPT) == greedy(llama, mlx_cache.make_prompt_cache(llama), PROMPT)
    xkv.disable(llama)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "deepseek_v32", "llama4_text"])
def test_snapshot_of_other_caches_too(name):
    """Rotating, chunked and state caches, and caches in lists."""
    model = build(name)
    xkv.enable(model, **{**OPTIONS, "rank_k": "full", "rank_v": "full"})
    cache = mlx_cache.make_prompt_cache(model)
    greedy(model, cache, PROMPT)
    before = np.array(model(mx.array([[7]]), cache=copy.deepcopy(cache)))
    snapshot = Snapshot(cache)
    greedy(model, cache, MORE)
    assert not np.array_equal(before, np.array(model(mx.array([[7]]), cache=copy.deepcopy(cache))))
    snapshot.restore()
    after = np.array(model(mx.array([[7]]), cache=copy.deepcopy(cache)))
    np.testing.assert_array_equal(after, before)
    xkv.disable(model)
