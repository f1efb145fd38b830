"""What a generation, a cache and a model hold is free when they go, without Python's collector."""

from __future__ import annotations

import gc
import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest

from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import XKVConfig
from xkv.backends import mlx_metal

GENERATE = sys.modules["mlx_lm.generate"]
CONFIG = XKVConfig(rank_k=24, rank_v=32, group_size=2, window=16, max_tail=16)
# one for all: it keeps the frequencies of rotations
BACKEND = mlx_metal.make_backend()
PROMPT = np.random.default_rng(0).integers(300, 1000, 200).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"]))


@pytest.fixture(autouse=True)
def no_collector():
    before = mx.set_cache_limit(0)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    mx.set_cache_limit(before)


def held() -> int:
    for stream in (mx.default_stream(mx.default_device()), GENERATE.generation_stream):
        mx.synchronize(stream)
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.fixture
def loaded(folder):
    model, tokenizer = mlx_lm.load(folder)
    mlx_metal.enable(model, CONFIG, backend=BACKEND)
    # what mlx-lm and the backend keep from a first call
    mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=3)
    gc.collect()
    return model, tokenizer


def run_whole(model, tokenizer):
    mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=3)


def run_with_draft(model, tokenizer):
    mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=3, draft_model=model)


def run_a_step(model, tokenizer):
    next(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=30))


def run_a_failure(model, tokenizer):
    def fail(done, total):
        if done > 100:
            raise OSError

    with pytest.raises(OSError):
        mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=3, prompt_progress_callback=fail)


def make_only(model, tokenizer):
    cache = mlx_cache.make_prompt_cache(model)
    cache[0].update_and_fetch(*[mx.ones((1, 2, 40, 16))] * 2)


@pytest.mark.parametrize(
    "run",
    [run_whole, run_with_draft, run_a_step, run_a_failure, make_only],
    ids=lambda x: x.__name__,
)
def test_a_generation_leaves_nothing(loaded, run):
    before = held()
    for _ in range(3):
        run(*loaded)
        assert held() == before


def test_an_unfinished_prompt_was_held(loaded):
    """What the test above compares is not blind."""
    before = held()
    steps = mlx_lm.stream_generate(*loaded, PROMPT, max_tokens=30)
    next(steps)
    assert held() > before + 10_000
    steps.close()
    assert held() == before


def nothing(model):
    pass


def generate(model):
    mlx_metal.enable(model, CONFIG, backend=BACKEND)
    list(GENERATE.generate_step(mx.array(PROMPT), model, max_tokens=2))


def disable(model):
    generate(model)
    mlx_metal.disable(model)


def enable_again(model):
    generate(model)
    mlx_metal.enable(model, XKVConfig(), backend=BACKEND)


def own_cache(model):
    mlx_metal.make_prompt_cache(model)


@pytest.mark.parametrize(
    "use", [nothing, generate, disable, enable_again, own_cache], ids=lambda x: x.__name__
)
def test_a_deleted_model_frees_its_weights(loaded, folder, use):
    before = held()
    model = mlx_lm.load(folder)[0]
    use(model)
    assert held() > before
    del model
    assert held() == before


def test_a_deleted_model_gives_mlx_lm_its_functions_back(folder):
    names = [(GENERATE, "generate_step"), (mlx_cache, "make_prompt_cache")]
    before = [getattr(*name) for name in names]
    model = mlx_lm.load(folder)[0]
    mlx_metal.enable(model, CONFIG, backend=BACKEND)
    assert all(getattr(*name) is not old for name, old in zip(names, before, strict=True))
    del model
    assert [getattr(*name) for name in names] == before
