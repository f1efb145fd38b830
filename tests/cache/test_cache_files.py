"""One file format: what one side saves, the other goes on with, by the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model
from transformers.cache_utils import DynamicSlidingWindowLayer

import xkv
from tests.torch_models import greedy, make_model, make_prompt
from xkv import InputError
from xkv.backends.torch_cuda.model.native_state import ROTATING, read_native, write_native

DENSE = {"window": 16, "max_tail": 16}
RANKS = {"rank_k": 24, "rank_v": 32}
CONFIGS = {
    "full": {"rank_k": "full", "rank_v": "full", **DENSE},
    "every row": {**RANKS, **DENSE, "attention": "exact"},
    "working set": {**RANKS, **DENSE, "budget": 48, "kept_share": 0.5, "last_layer": 3},
}
PROMPT = make_prompt(200, seed=3)[0].tolist()
N_BEFORE, N_AFTER = 24, 40  # rows were folded before and will be after
OPTIONS = {
    "llama": {"head_dim": 32},
    "gemma3": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
}


class Sides:
    """One checkpoint in both frameworks, and the greedy tokens of each."""

    def __init__(self, folder: Path, name: str, dtype: str = "float32") -> None:
        make_model(name, **OPTIONS.get(name, {})).save_pretrained(folder)
        self.mlx = load_model(folder)[0]
        self.mlx.set_dtype(getattr(mx, dtype))
        self.torch = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.torch.generation_config.eos_token_id = None

    def run_mlx(self, tokens, cache, n) -> list[int]:
        steps = generate_step(mx.array(tokens), self.mlx, max_tokens=n, prompt_cache=cache)
        return [token for token, _ in steps]

    def run_torch(self, tokens, cache, n) -> list[int]:
        seen = cache.get_seq_length()
        rows = torch.tensor([[0] * seen + tokens])
        return greedy(self.torch, rows, n=n, cache=cache)[0]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def sides(request, tmp_path_factory) -> Sides:
    return Sides(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def enabled(sides):
    def enable(config):
        xkv.enable(sides.mlx, **config)
        return make_prompt_cache(sides.mlx)

    yield enable
    xkv.disable(sides.mlx)


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_of_mlx_goes_on_in_torch(sides, enabled, tmp_path, name):
    cache, file = enabled(CONFIGS[name]), str(tmp_path / "cache.safetensors")
    began = sides.run_mlx(PROMPT, cache, N_BEFORE)
    xkv.save_prompt_cache(file, cache)
    want = sides.run_mlx(began[-1:], cache, N_AFTER)
    again = xkv.load_torch_cache(sides.torch, file, **CONFIGS[name])
    assert again.sequences[0].groups[0].is_compressed
    assert sides.run_torch(began[-1:], again, N_AFTER) == want


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_of_torch_goes_on_in_mlx(sides, enabled, tmp_path, name):
    cache, file = xkv.torch_cache(sides.torch, **CONFIGS[name]), str(tmp_path / "cache")
    began = sides.run_torch(PROMPT, cache, N_BEFORE)
    xkv.save_prompt_cache(file, cache, {"model": "tiny"})
    want = sides.run_torch(began[-1:], cache, N_AFTER)
    enabled(CONFIGS[name])
    again, metadata = xkv.load_prompt_cache(f"{file}.safetensors", return_metadata=True)
    assert metadata == {"model": "tiny"}
    assert sides.run_mlx(began[-1:], again, N_AFTER) == want


WINDOW = 8


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("n_rows", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2])
def test_sliding_window_goes_both_ways(n_rows, one_by_one):
    rows = torch.arange(1.0, n_rows + 2)[None, None, :, None]
    mine, its = DynamicSlidingWindowLayer(WINDOW), RotatingKVCache(WINDOW)
    step = 1 if one_by_one else n_rows
    for start in range(0, n_rows, step):
        piece = rows[:, :, start : start + step]
        mine.update(piece, piece)
        its.update_and_fetch(*[mx.array(piece.numpy())] * 2)
    again = DynamicSlidingWindowLayer(WINDOW)
    read_native(again, ROTATING, [torch.tensor(np.array(x)) for x in its.state])
    assert torch.equal(again.keys, mine.keys)
    assert again.get_seq_length() == mine.get_seq_length() == n_rows
    name, state = write_native(mine)
    assert name == ROTATING
    numbers = [x.item() if x.ndim == 0 else mx.array(x.numpy()) for x in state]
    back = RotatingKVCache.from_state(numbers)
    for _ in range(2):
        row = mx.array(rows[:, :, n_rows:].numpy())
        got, want = (x.update_and_fetch(row, row)[0] for x in (back, its))
        assert sorted(got.flatten().tolist()) == sorted(want.flatten().tolist())


def test_bfloat16_survives_both_ways(tmp_path):
    sides, file = Sides(tmp_path, "llama", "bfloat16"), str(tmp_path / "cache.safetensors")
    cache = xkv.torch_cache(sides.torch, **CONFIGS["every row"])
    sides.run_torch(PROMPT, cache, N_BEFORE)
    written = [layer.parts[0].arrays() for layer in cache.layers]
    xkv.save_prompt_cache(file, cache)
    in_mlx = xkv.load_prompt_cache(file)
    xkv.save_prompt_cache(file, in_mlx)
    again = xkv.load_torch_cache(sides.torch, file)
    for layer, mine, its in zip(in_mlx, written, again.layers, strict=True):
        assert layer.keys.dtype == mx.bfloat16
        for got, want in zip(its.parts[0].arrays(), mine, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture
def saved(model, tmp_path):
    cache = xkv.torch_cache(model, rank_k=24, rank_v=32)
    greedy(model, make_prompt(300), cache=cache)
    file = tmp_path / "saved.safetensors"
    xkv.save_prompt_cache(str(file), cache)
    return file


def test_broken_and_foreign_files_are_one_sentence(model, saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"saved\.safetensors is no prompt cache, or is inco"):
            xkv.load_torch_cache(model, str(saved))
    with pytest.raises(InputError, match="there is no prompt cache file"):
        xkv.load_torch_cache(model, str(tmp_path / "other.safetensors"))
    mx.save_safetensors(str(saved), {"a": mx.zeros(3)})
    with pytest.raises(InputError, match="is no prompt cache"):
        xkv.load_torch_cache(model, str(saved))


def test_file_of_another_configuration_model_or_version_is_refused(model, saved, monkeypatch):
    with pytest.raises(InputError, match=r"made with rank_k=24 \(here 20\)"):
        xkv.load_torch_cache(model, str(saved), rank_k=20, rank_v=32)
    torch.manual_seed(5)
    reseeded = transformers.AutoModelForCausalLM.from_config(model.config)
    for other in (reseeded, make_model("llama", num_hidden_layers=6)):
        with pytest.raises(InputError, match=r"saved\.safetensors.* made by another model"):
            xkv.load_torch_cache(other, str(saved))
    monkeypatch.setattr("xkv.cache.state.FORMAT", 99)
    with pytest.raises(InputError, match=r"format \d+, and this version of xkv reads format 99"):
        xkv.load_torch_cache(model, str(saved))


def test_failed_write_keeps_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()
    cache = xkv.load_torch_cache(model, str(saved))

    def full_disk(arrays, file, about):
        with open(file, "wb") as out:
            out.write(b"part")
        raise OSError(28, "No space left on device")

    for write in (full_disk, lambda arrays, file, about: open(file, "wb").close()):
        monkeypatch.setattr("xkv.backends.torch_cuda.model.files.save_file", write)
        with pytest.raises(InputError, match=r"cannot write .*; nothing was changed"):
            xkv.save_prompt_cache(str(saved), cache)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_batch_with_padding_is_refused(model, tmp_path):
    rows = make_prompt(30, batch=2)
    mask = torch.ones_like(rows)
    mask[0, 0] = 0
    cache = xkv.torch_cache(model)
    greedy(model, rows, mask, cache=cache)
    with pytest.raises(InputError, match="padding cannot be saved"):
        xkv.save_prompt_cache(str(tmp_path / "a"), cache)


def test_latents_go_on_where_they_were_made(tmp_path):
    model, prompt, file = make_model("deepseek_v3"), make_prompt(200), str(tmp_path / "a")
    cache = xkv.torch_cache(model, rank_k=40, rank_v=8, window=16)
    xkv.torch_prefill(model, cache, prompt)
    xkv.save_prompt_cache(file, cache)
    again = xkv.load_torch_cache(model, f"{file}.safetensors")
    assert again.sequences[0].groups[0].is_compressed
    assert greedy(model, prompt, cache=again) == greedy(model, prompt, cache=cache)
    with pytest.raises(InputError, match="latents of an MLA model"):
        xkv.load_prompt_cache(f"{file}.safetensors")
