"""The mlx-lm cache: exact at full rank on every architecture, mlx-lm's contract, and true bytes."""

from __future__ import annotations

import copy
import gc

import mlx.core as mx
import mlx_lm
import mlx_lm.models.base
import mlx_lm.models.llama
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_native_cache
from mlx_lm.models.cache import trim_prompt_cache

from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal import XKVCache, attention_seam, make_prompt_cache

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16}
PROMPT = np.random.default_rng(0).integers(300, 1000, 150).tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return mlx_lm.load(str(write_checkpoint(folder, ARCHITECTURES[request.param])))[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return mlx_lm.load(str(write_checkpoint(folder, ARCHITECTURES["llama"])))[0]


def greedy(model, cache, prompt=PROMPT, n_tokens=12, step_size=64) -> list[int]:
    from mlx_lm.generate import generate_step

    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=n_tokens,
        prompt_cache=cache,
        prefill_step_size=step_size,
    )
    return [token for token, _ in steps]


def logits_after(model, cache, prompt=PROMPT) -> np.ndarray:
    """Prefill all but the last token, then the logits of the last one."""
    model(mx.array([prompt[:-1]]), cache=cache)
    return np.array(model(mx.array([prompt[-1:]]), cache=cache)[0, -1])


def test_full_rank_gives_the_tokens_of_the_full_cache(model):
    want = greedy(model, make_native_cache(model))
    cache = make_prompt_cache(model, XKVConfig(group_size=2, **EXACT))
    with attention_seam():
        got = greedy(model, cache)
    assert all(layer.layer.is_compressed for layer in cache)
    assert got == want


def test_full_rank_gives_the_same_tokens_without_the_seam(model):
    want = greedy(model, make_native_cache(model))
    assert greedy(model, make_prompt_cache(model, XKVConfig(group_size=4, **EXACT))) == want


def test_low_rank_changes_the_logits_and_full_rank_does_not(llama):
    want = logits_after(llama, make_native_cache(llama))
    for rank, is_close in (("full", True), (12, False)):
        config = XKVConfig(rank_k=rank, rank_v=rank, window=16, group_size=4)
        with attention_seam():
            got = logits_after(llama, make_prompt_cache(llama, config))
        assert np.allclose(got, want, atol=1e-4) == is_close


def test_seam_is_used_and_restored(llama, monkeypatch):
    original = mlx_lm.models.base.scaled_dot_product_attention
    attended = []
    monkeypatch.setattr(
        XKVCache,
        "attend",
        lambda self, queries, *_: attended.append(self) or mx.zeros_like(queries),
    )
    cache = make_prompt_cache(llama, XKVConfig(**EXACT))
    with attention_seam():
        logits_after(llama, cache)
    assert attended == cache
    for module in (mlx_lm.models.base, mlx_lm.models.llama):
        assert module.scaled_dot_product_attention is original


def test_groups_share_their_latents_and_count_them_once(llama):
    cache = make_prompt_cache(llama, XKVConfig(group_size=3, rank_k=8, rank_v=8, window=16))
    logits_after(llama, cache)
    first, second, third, fourth, _ = (layer.layer for layer in cache)
    assert first.group is second.group is third.group is not fourth.group
    latents = first.group.keys.latent.nbytes + first.group.values.latent.nbytes
    assert cache[0].nbytes == cache[1].nbytes + latents
    assert sum(layer.nbytes for layer in cache) == first.cache.held_bytes()


@pytest.mark.parametrize("attention", ["exact", "auto"])
def test_held_bytes_agree_with_mlx_within_two_percent(tmp_path, request, attention):
    # otherwise MLX serves small arrays from freed buffers up to two pages larger
    before_limit = mx.set_cache_limit(0)
    request.addfinalizer(lambda: mx.set_cache_limit(before_limit))
    llama = mlx_lm.load(str(write_checkpoint(tmp_path, {"model_type": "llama", "head_dim": 64})))[0]
    config = XKVConfig(compression=3, attention=attention, budget=128, window=16)
    prompt = np.random.default_rng(1).integers(300, 1000, 3000).tolist()

    def active() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    with attention_seam():
        greedy(llama, make_prompt_cache(llama, config), prompt[:200], n_tokens=2)
        before = active()
        cache = make_prompt_cache(llama, config)
        greedy(llama, cache, prompt, n_tokens=2, step_size=256)
        held = sum(layer.nbytes for layer in cache)
        assert active() - before == pytest.approx(held, rel=0.02)
    dense = cache[0].layer.cache.dense_bytes()
    assert dense == 5 * cache[0].offset * 2 * 2 * 64 * 4
    assert held == pytest.approx(dense / 3, rel=0.03)
    assert held <= dense / 3


def test_rebuilt_rows_are_not_kept_where_the_seam_is_not_used(tmp_path):
    llama = mlx_lm.load(str(write_checkpoint(tmp_path, {"model_type": "llama", "head_dim": 64})))[0]
    prompt = np.random.default_rng(1).integers(300, 1000, 2000).tolist()
    greedy(llama, make_native_cache(llama), prompt[:200], n_tokens=2)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = make_prompt_cache(llama, XKVConfig(compression=3, window=16))
    greedy(llama, cache, prompt, n_tokens=2, step_size=256)
    gc.collect()
    mx.clear_cache()
    held = sum(layer.nbytes for layer in cache)
    assert mx.get_active_memory() - before == pytest.approx(held, rel=0.05)


def test_nothing_as_long_as_the_prompt_is_kept_dense_between_steps(llama):
    cache = make_prompt_cache(llama, XKVConfig(rank_k=8, rank_v=8, window=16))
    with attention_seam():
        greedy(llama, cache)
    for layer in cache:
        assert max(x.shape[-2] for x in layer.state if x.ndim == 4 and x.shape[1] == 2) < 60


@pytest.mark.parametrize(
    ("attention", "n_trimmed"),
    [
        *(("exact", n_trimmed) for n_trimmed in (3, 20, 100, 140, 150)),
        # so much of the segment is trimmed that the budget covers the rest
        *(("auto", n_trimmed) for n_trimmed in (40, 45, 100, 140, 150)),
    ],
)
def test_trim_forgets_tokens_exactly(llama, n_trimmed, attention):
    config = XKVConfig(**EXACT, attention=attention, budget=130)
    cache, native = make_prompt_cache(llama, config), make_native_cache(llama)
    with attention_seam():
        for each in (cache, native):
            logits_after(llama, each)
            trim_prompt_cache(each, n_trimmed)
        assert cache[0].offset == len(PROMPT) - n_trimmed
        got, want = (logits_after(llama, each, PROMPT[:40]) for each in (cache, native))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_later_turns_see_the_compressed_prompt(llama):
    cache, native = make_prompt_cache(llama, XKVConfig(**EXACT)), make_native_cache(llama)
    with attention_seam():
        for length in (150, 5, 50):  # 5 and 50 queries take the two attention paths
            got, want = (logits_after(llama, each, PROMPT[:length]) for each in (cache, native))
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_speculative_decoding_gives_the_same_tokens(llama):
    from mlx_lm.generate import speculative_generate_step

    want = greedy(llama, make_native_cache(llama))
    cache = make_prompt_cache(llama, XKVConfig(**EXACT)) + make_native_cache(llama)
    with attention_seam():
        steps = speculative_generate_step(
            mx.array(PROMPT), llama, llama, max_tokens=12, prompt_cache=cache, num_draft_tokens=3
        )
        assert [token for token, *_ in steps] == want
    assert cache[0].layer.is_compressed


def test_deepcopy_shares_no_state_but_gives_the_same_logits(llama):
    with attention_seam():
        cache = make_prompt_cache(llama, XKVConfig(group_size=5, **EXACT))
        logits_after(llama, cache)
        twin = copy.deepcopy(cache)
        assert twin[0].layer.group is twin[4].layer.group is not cache[0].layer.group
        first = logits_after(llama, cache, PROMPT[:5])
        assert twin[0].offset == 150 and cache[0].offset == 155
        np.testing.assert_allclose(logits_after(llama, twin, PROMPT[:5]), first, atol=1e-5)


def test_short_prompt_stays_dense_and_says_so(llama):
    cache = make_prompt_cache(llama, XKVConfig(compression=4))
    with attention_seam():
        assert greedy(llama, cache, PROMPT[:50]) == greedy(
            llama, make_native_cache(llama), PROMPT[:50]
        )
    assert not cache[0].layer.is_compressed
    assert "kept dense: 49 tokens" in cache[0].layer.cache.notice


def test_budget_that_covers_everything_is_exact(llama):
    cache = make_prompt_cache(llama, XKVConfig(**EXACT, budget=4096))
    native = make_native_cache(llama)
    with attention_seam():
        np.testing.assert_allclose(
            logits_after(llama, cache), logits_after(llama, native), atol=1e-4
        )
    assert cache[0].layer.rows.n_recent == 0


def test_layers_outside_the_groups_keep_their_native_cache(llama):
    cache = make_prompt_cache(llama, XKVConfig(first_layer=1, last_layer=3, group_size=2, **EXACT))
    assert [type(layer).__name__ for layer in cache] == ["KVCache", *["XKVCache"] * 3, "KVCache"]
    with attention_seam():
        assert greedy(llama, cache) == greedy(llama, make_native_cache(llama))


def test_rank_above_the_joint_width_is_refused(llama):
    cache = make_prompt_cache(llama, XKVConfig(rank_k=999, rank_v=8))
    with pytest.raises(InputError, match=r"rank_k=999 exceeds the joint width 128"):
        greedy(llama, cache)


def test_own_copies_a_part_of_an_array_so_that_the_rest_is_freed(mlx_backend):
    rows = mx.random.normal((1, 2, 2000, 64))
    want = np.array(rows[:, :, :500])
    before = mlx_backend.active_memory() - rows.nbytes
    part = mlx_backend.own(rows[:, :, :500])
    mlx_backend.evaluate(part)
    del rows
    assert mlx_backend.active_memory() - before < 1.1 * part.nbytes
    assert np.array_equal(np.array(part), want)
