"""Caches of an enabled model in files: they continue the same, or are refused in one sentence."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import pytest

import xkv
from tests.mlx_metal.enabled_model import LOSSY, PROMPT, greedy, new_cache
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal import MLXBackend, enable
from xkv.backends.mlx_metal.model.enabled import lowrank_cache


@pytest.mark.parametrize("functions", [mlx_cache, xkv], ids=["mlx-lm", "xkv"])
@pytest.mark.parametrize("kind", ["llama", "hybrid", "working set"])
def test_saved_cache_continues_the_same(tmp_path, model, hybrid, functions, kind):
    options = {**LOSSY, "rank_k": 12, "rank_v": 12}
    if kind == "working set":
        options |= {"budget": 64, "kept_share": 0.5}
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
    if kind == "working set":
        assert again[0].layer.rows.n_recent
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
