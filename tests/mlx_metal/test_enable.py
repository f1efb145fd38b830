"""An enabled model: mlx-lm's own functions with our cache, and nothing left when disabled."""

from __future__ import annotations

import copy
import gc
import json
import os

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base

import xkv
from tests.architectures import build
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal import MLXBackend, XKVCache, enable
from xkv.backends.mlx_metal.model.enable import lowrank_cache
from xkv.backends.mlx_metal.model.prefill import Prefill
from xkv.cache import state as cache_state

EXACT = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 16, "max_tail": 16}
LOSSY = {"rank_k": 24, "rank_v": 32, "group_size": 2, "window": 16, "max_tail": 16}
PROMPT = np.random.default_rng(0).integers(300, 1000, 200).tolist()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])
    return mlx_lm.load(str(folder))


@pytest.fixture
def model(loaded):
    yield loaded[0]
    if hasattr(loaded[0], "_xkv"):
        xkv.disable(loaded[0])


@pytest.fixture(scope="module")
def hybrid():
    """Sliding windows, and full attention in every third layer."""
    return build("gemma3_text")


def greedy(model, cache, prompt=PROMPT, n_tokens=12, **options) -> list[int]:
    options = {"prefill_step_size": 64, **options}
    steps = generate_step(
        mx.array(prompt), model, max_tokens=n_tokens, prompt_cache=cache, **options
    )
    return [token for token, _ in steps]


def new_cache(model):
    return mlx_cache.make_prompt_cache(model)


def active_memory() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def test_mlx_lm_functions_get_our_cache_and_answer_as_before(loaded, model):
    tokenizer = loaded[1]
    want = [x.token for x in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12)]
    report = xkv.enable(model, **EXACT)
    assert report.count("compressed") == 5
    assert all(type(layer) is XKVCache for layer in new_cache(model))
    got = [x.token for x in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12)]
    assert got == want
    cache = new_cache(model)
    assert greedy(model, cache) == want
    assert all(layer.layer.is_compressed for layer in cache)


def test_disable_restores_everything(loaded, model):
    generate = mlx_lm.generate.__globals__
    before = (
        dict(vars(model)),
        [type(layer) for layer in model.layers],
        base.scaled_dot_product_attention,
        generate["generate_step"],
        globals()["generate_step"],
        dict(vars(mlx_cache)),
    )
    xkv.enable(model, **EXACT)
    assert type(model.layers[0]) is not before[1][0]
    assert generate["generate_step"] is not before[3]
    xkv.disable(model)
    after = (
        dict(vars(model)),
        [type(layer) for layer in model.layers],
        base.scaled_dot_product_attention,
        generate["generate_step"],
        globals()["generate_step"],
        dict(vars(mlx_cache)),
    )
    assert before == after
    with pytest.raises(InputError, match="not enabled"):
        xkv.disable(model)


def test_two_models_do_not_disturb_each_other(model, hybrid):
    xkv.enable(model, **EXACT)
    xkv.enable(hybrid, **EXACT)
    xkv.disable(hybrid)
    assert type(new_cache(model)[0]) is XKVCache
    cache = new_cache(model)
    greedy(model, cache)
    assert cache[0].layer.is_compressed
    assert not any(type(layer) is XKVCache for layer in new_cache(hybrid))


@pytest.mark.parametrize("option", [{"kv_bits": 4}, {"max_kv_size": 64}])
def test_what_changes_the_native_cache_is_refused(model, option):
    xkv.enable(model, **EXACT)
    with pytest.raises(InputError, match=next(iter(option)).replace("_", "-")):
        greedy(model, None, **option)


def test_layer_by_layer_prefill_changes_no_logits(model):
    """With the window longer than the prompt nothing is compressed, only the order differs."""
    native, mine = new_cache(model), None
    xkv.enable(model, **{**EXACT, "window": 500})
    mine = new_cache(model)
    results = []
    for cache in (native, mine):
        step = generate_step(mx.array(PROMPT), model, prompt_cache=cache, prefill_step_size=48)
        results.append(np.array(next(step)[1]))
    np.testing.assert_allclose(results[1], results[0], atol=5e-5)
    keys = np.array(mine[3].layer.rows.keys.rows)
    # another order of sums: 1.3e-5 was seen
    np.testing.assert_allclose(keys, np.array(native[3].keys)[:, :, : keys.shape[2]], atol=5e-5)


def test_prompt_goes_through_layer_by_layer(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    seen = []
    finish = Prefill._finish

    def note(self, layer_cache):
        finish(self, layer_cache)
        seen.append([layer.offset for layer in cache])

    monkeypatch.setattr(Prefill, "_finish", note)
    progress = []
    greedy(
        model, cache, prompt_progress_callback=lambda done, total: progress.append((done, total))
    )
    assert seen[0] == [199, 0, 0, 0, 0]
    assert seen[3] == [199] * 4 + [0]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (200, 200)


def test_groups_are_factored_before_later_layers_begin(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    states = []
    finish = Prefill._finish

    def note(self, layer_cache):
        finish(self, layer_cache)
        states.append([layer.layer.is_compressed for layer in cache])

    monkeypatch.setattr(Prefill, "_finish", note)
    greedy(model, cache)
    assert states[1] == [True, True, False, False, False]


@pytest.mark.parametrize("functions", [mlx_cache, xkv], ids=["mlx-lm", "xkv"])
@pytest.mark.parametrize("kind", ["llama", "hybrid", "selective"])
def test_saved_cache_continues_the_same(tmp_path, model, hybrid, functions, kind):
    options = {**LOSSY, "rank_k": 12, "rank_v": 12}
    if kind == "selective":
        options |= {"attention": "selective", "budget": 64, "outlier_chunks": 2}
    model = hybrid if kind == "hybrid" else model
    prompt = [token % 250 for token in PROMPT] if kind == "hybrid" else PROMPT
    xkv.enable(model, **options)
    cache = new_cache(model)
    greedy(model, cache, prompt, n_tokens=40)
    functions.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"a": "b"})
    want = greedy(model, cache, prompt[:30])
    again, metadata = functions.load_prompt_cache(
        str(tmp_path / "cache.safetensors"), return_metadata=True
    )
    assert metadata["a"] == "b"
    assert greedy(model, again, prompt[:30]) == want
    if kind == "selective":
        assert again[0].layer.landmarks is not None
    if kind == "llama":
        assert again[0].layer.group is again[1].layer.group is not again[2].layer.group
    if kind == "hybrid":
        xkv.disable(hybrid)


def test_tuple_of_caches_is_saved(tmp_path, model):
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    greedy(model, cache)
    file = str(tmp_path / "cache.safetensors")
    xkv.save_prompt_cache(file, tuple(cache))
    again = xkv.load_prompt_cache(file)
    assert greedy(model, again, PROMPT[:30]) == greedy(model, cache, PROMPT[:30])


@pytest.fixture
def saved(tmp_path, model):
    """A file with a compressed cache."""
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    greedy(model, cache)
    file = tmp_path / "saved.safetensors"
    xkv.save_prompt_cache(str(file), cache)
    return file


def test_broken_cache_files_are_one_sentence(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1000):
        saved.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"saved\.safetensors is no prompt cache, or is inc"):
            xkv.load_prompt_cache(str(saved))
    with pytest.raises(InputError, match="there is no prompt cache file"):
        xkv.load_prompt_cache(str(tmp_path / "other.safetensors"))
    mx.save_safetensors(str(saved), {"a": mx.zeros(3)})
    with pytest.raises(InputError, match="no prompt cache"):
        xkv.load_prompt_cache(str(saved))


def test_cache_file_of_another_version_is_refused(saved, model, monkeypatch):
    monkeypatch.setattr("xkv.cache.state.FORMAT", 99)
    with pytest.raises(InputError, match=r"format \d+, and this version of xkv reads format 99"):
        xkv.load_prompt_cache(str(saved))


def test_cache_of_another_configuration_or_model_is_refused(saved, model, tmp_path):
    cache = xkv.load_prompt_cache(str(saved))
    xkv.enable(model, **{**LOSSY, "rank_k": 20})
    with pytest.raises(InputError, match=r"made with rank_k=24 \(here 20\)"):
        greedy(model, cache)
    other = mlx_lm.load(str(write_checkpoint(tmp_path / "other", ARCHITECTURES["llama"], seed=7)))[
        0
    ]
    xkv.enable(other, **LOSSY)
    with pytest.raises(InputError, match="made by another model"):
        greedy(other, cache)
    xkv.disable(other)


def test_loaded_cache_takes_the_models_backend(saved, model):
    backend = MLXBackend("off")
    enable(model, XKVConfig(**LOSSY), backend=backend)
    cache = xkv.load_prompt_cache(str(saved))
    assert lowrank_cache(cache).backend.kernels.mode == "auto"
    greedy(model, cache, PROMPT[:30])
    assert lowrank_cache(cache).backend is backend


def test_failed_write_keeps_the_old_file(saved, model, monkeypatch):
    before = saved.read_bytes()
    cache = xkv.load_prompt_cache(str(saved))

    def full_disk(file, *args):
        with open(file, "wb") as out:
            out.write(b"part")
        raise RuntimeError("[save_safetensors] Failed to write")

    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(InputError, match=r"cannot write .* nothing was changed"):
        xkv.save_prompt_cache(str(saved), cache)
    # MLX does not notice that a disk is full: the file is only short
    monkeypatch.setattr(mx, "save_safetensors", lambda file, *args: open(file, "wb").close())
    with pytest.raises(InputError, match="the disk is full; nothing was changed"):
        xkv.save_prompt_cache(str(saved), cache)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    with pytest.raises(InputError, match="cannot write"):
        xkv.save_prompt_cache(str(saved.parent / "missing" / "x.safetensors"), cache)


@pytest.mark.parametrize("n_trimmed", [1, 30, 150, 5000])
def test_trim_prompt_cache(model, n_trimmed):
    want_cache = new_cache(model)
    xkv.enable(model, **EXACT)
    cache = new_cache(model)
    results = []
    for each in (want_cache, cache):
        greedy(model, each, n_tokens=30)
        length = each[0].offset
        trimmed = mlx_cache.trim_prompt_cache(each, n_trimmed)
        assert trimmed == min(n_trimmed, length)
        assert each[0].offset == length - trimmed
        results.append(greedy(model, each, PROMPT[:20]))
    assert results[0] == results[1]


def test_speculative_decoding_gives_the_same_tokens(loaded, model):
    draft = mlx_lm.load(str(xkv.tiny.CHECKPOINT_DIR))[0]
    vocabulary = model.args.vocab_size
    assert draft.args.vocab_size == vocabulary

    def tokens(options):
        steps = speculative_generate_step(
            mx.array(PROMPT), model, draft, max_tokens=24, num_draft_tokens=3, **options
        )
        return [int(token) for token, *_ in steps]

    want = tokens({})
    xkv.enable(model, **EXACT)
    assert tokens({}) == want
    draft_report = xkv.enable(draft, rank_k="full", rank_v="full", window=16)
    assert draft_report.count("compressed") == 8
    assert tokens({"prefill_step_size": 64}) == want
    xkv.disable(draft)


def test_prompt_cache_tree_of_the_server(model):
    """Exact, shorter and longer hits, continued, give what a fresh cache gives."""
    xkv.enable(model, **EXACT)
    tree = mlx_cache.LRUPromptCache(10)
    cache = new_cache(model)
    reply = greedy(model, cache, n_tokens=20)
    # generate_step runs one token ahead
    tokens = PROMPT + reply
    tree.insert_cache("key", tokens, cache)
    questions = {
        "exact": tokens,
        "shorter": [*tokens, *PROMPT[:25]],
        "longer": [*PROMPT[:90], *PROMPT[:25]],
    }
    for name, question in questions.items():
        found, rest = tree.fetch_nearest_cache("key", question)
        assert found is not None
        assert len(rest) == {"exact": 0, "shorter": 25, "longer": 25}[name]
        if name == "exact":
            continue
        assert greedy(model, found, rest) == greedy(model, new_cache(model), question)
    assert cache[0].offset == len(tokens)


def test_copies_share_the_factors(tmp_path):
    folder = write_checkpoint(tmp_path, {"model_type": "llama", "head_dim": 64})
    model = mlx_lm.load(str(folder))[0]
    xkv.enable(model, compression=3, window=16, latent_bits=16)
    prompt = np.random.default_rng(1).integers(300, 1000, 3000).tolist()
    cache = new_cache(model)
    greedy(model, cache, prompt, n_tokens=1, prefill_step_size=512)
    held = sum(layer.nbytes for layer in cache)
    before = active_memory()
    copies = [copy.deepcopy(cache) for _ in range(4)]
    for number, each in enumerate(copies):
        greedy(model, each, prompt[number : number + 20], n_tokens=2)
    grown = active_memory() - before
    # each copy has sinks, window and tail of its own, 4 + 16 + 23 of 3000 tokens, buffers aside
    assert grown < 4 * 0.06 * held
    assert copies[0][0].layer.group is copies[0][1].layer.group
    xkv.disable(model)


def test_contract_of_a_fresh_cache(model):
    """What mlx-lm's own cache tests ask of every cache."""
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    layer = cache[0]
    assert layer.empty() and layer.size() == layer.offset == layer.nbytes == 0
    assert layer.is_trimmable() and layer.trim(3) == 0
    assert layer.make_mask(1) is None and layer.make_mask(5) == "causal"
    assert layer.make_mask(5, return_array=True).shape == (5, 5)
    for name in ("bits", "to_quantized", "__len__"):
        assert not hasattr(layer, name)
    assert mlx_cache.can_trim_prompt_cache(cache)
    keys = mx.random.normal((1, 2, 10, 16))
    got_keys, got_values = layer.update_and_fetch(keys, keys)
    assert mx.array_equal(got_keys, keys) and mx.array_equal(got_values, keys)
    assert layer.size() == 10 and not layer.empty()
    state = layer.state
    assert all(isinstance(value, mx.array) for _, value in tree_flatten(state))
    again = XKVCache.from_state(state)
    assert again.offset == 10
    assert json.loads(np.array(state[0]).tobytes())["format"] == cache_state.FORMAT


def test_prompt_that_is_interrupted_leaves_other_caches_alone(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    first = new_cache(model)
    want = greedy(model, copy.deepcopy(first))
    cache = copy.deepcopy(first)
    progress = []

    def interrupt(done, total):
        progress.append(done)
        if len(progress) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, cache, prompt_progress_callback=interrupt)
    assert greedy(model, first) == want


def test_compressed_peak_and_held_are_counted(model):
    xkv.enable(model, compression=3, window=16, latent_bits=16)
    cache = new_cache(model)
    greedy(model, cache, n_tokens=1)
    dense = lowrank_cache(cache).dense_bytes()
    assert sum(layer.nbytes for layer in cache) <= dense / 2.5
