"""``python -m xkv.plan``: from config.json alone, hand-computed bytes and those of a real run."""

from __future__ import annotations

import gc
import itertools
import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx_lm.generate import generate_step

from tests.architectures import CONFIGS
from xkv import XKVConfig, plan
from xkv.backends import mlx_metal
from xkv.footprint import (
    SEARCH_LIMIT,
    CacheBytes,
    CompressedCache,
    NativeCache,
    longest_context,
)
from xkv.tiny import CHECKPOINT_DIR

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization": {"group_size": 64, "bits": 4},
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1000,
    "sliding_window": 512,
    "sliding_window_pattern": 3,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def write(tmp_path):
    def write(config) -> str:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        return str(tmp_path)

    return write


def report(capsys, *argv: str) -> dict:
    plan.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def rows(found: dict) -> dict[str, dict]:
    return {entry["cache"]: entry for entry in found["caches"]}


def test_llama_8b_agrees_with_hand_computed_bytes(write, capsys):
    found = report(capsys, "--model", write(LLAMA_8B), "--memory", "12")
    weights = found["weight_bytes"]
    assert weights == pytest.approx(4.52e9, rel=0.02)
    table = rows(found)
    # 32 layers, 8 heads, keys and values of 128 features in 2 bytes
    assert table["full"]["bytes_per_1000_tokens"] == 131_072_000
    # 8 or 4 bits, and 16-bit scale and bias for 64 of them
    assert table["8 bit"]["bytes_per_1000_tokens"] == 131_072_000 * (8 + 0.5) / 16
    assert table["4 bit"]["bytes_per_1000_tokens"] == 131_072_000 * (4 + 0.5) / 16
    assert table["full"]["cache_bytes"] == 131_072 * 65_536
    # one layer's rows twice; q, k, v, o, gate, up and down of 2,048 tokens
    width = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
    fits = (12e9 - weights - 2048 * width * 2) / (131_072 + 4096)
    assert table["full"]["longest_context"] == int(fits) // 256 * 256
    assert table["full"]["limited_by"] == "memory"


def test_compression_shrinks_the_cache_and_lengthens_the_context(write, capsys):
    found = report(capsys, "--model", write(LLAMA_8B), "--memory", "12", "--compression", "4", "8")
    table = rows(found)
    assert list(table) == ["full", "8 bit", "4 bit", "xKV 4 x", "xKV 8 x"]
    for ratio in (4, 8):
        entry = table[f"xKV {ratio} x"]
        assert 131_072 * 65_536 / entry["cache_bytes"] == pytest.approx(ratio, rel=0.02)
        assert entry["command"].endswith(f"--compression {ratio}")
    longest = [table[name]["longest_context"] for name in ("full", "xKV 4 x", "xKV 8 x")]
    assert longest == sorted(set(longest))


def test_peak_of_compression_holds_one_dense_group_and_the_hidden_states(write):
    facts = mlx_metal.read_facts(write(LLAMA_8B), XKVConfig())
    n_tokens = 65_536
    cache = CompressedCache(facts, 8)
    beside = cache.peak_bytes(n_tokens) - facts.weight_bytes - cache.cache_bytes(n_tokens)
    hidden, group = n_tokens * 4096 * 2, 4 * n_tokens * 4096
    assert beside > 3 * hidden + group
    assert beside < 3 * hidden + 4 * group


def test_trained_context_is_named_as_the_limit(write, capsys):
    table = rows(report(capsys, "--model", write(LLAMA_8B), "--memory", "64"))
    assert {entry["limited_by"] for entry in table.values()} == {"training"}
    assert {entry["longest_context"] for entry in table.values()} == {131_072}


@pytest.mark.parametrize("memory", [5, 8, 12, 20])
def test_longest_context_is_the_last_that_fits(write, memory):
    facts = mlx_metal.read_facts(write(LLAMA_8B), XKVConfig())
    for cache in (NativeCache(facts), NativeCache(facts, 4), CompressedCache(facts, 8)):
        n_tokens = longest_context(cache, memory * 10**9)
        assert cache.peak_bytes(n_tokens) <= memory * 10**9
        assert n_tokens == 131_072 or cache.peak_bytes(n_tokens + 256) > memory * 10**9


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma3_text", "deepseek_v3", "falcon_h1"])
@pytest.mark.parametrize("compression", [2.5, 8])
def test_peak_never_falls_with_the_prompt(write, name, compression):
    facts = mlx_metal.read_facts(write(CONFIGS[name]), XKVConfig())
    assert (facts.why_not_layerwise is not None) == (name == "gemma3n")
    for cache in (NativeCache(facts), CompressedCache(facts, compression)):
        peaks = [cache.peak_bytes(n) for n in (0, 1, 131, *range(133, 12_000, 61))]
        # ranks are whole numbers: a longer prompt may get one less, and more bytes for it elsewhere
        assert all(after > 0.99 * before for before, after in itertools.pairwise(peaks))


def test_sliding_windows_count_up_to_their_size(write, capsys):
    found = report(capsys, "--model", write(GEMMA3), "--memory", "1", "--context", "10000")
    table, row_bytes = rows(found), 2 * 2 * 64 * 2
    # layers 2 and 5 are global
    assert table["full"]["cache_bytes"] == row_bytes * (2 * 10_000 + 4 * 512)
    windows = row_bytes * 4 * 512
    entry = table["xKV 4 x"]
    assert entry["cache_bytes"] - windows == pytest.approx(row_bytes * 2 * 10_000 / 4, rel=0.02)
    assert "RotatingKVCache" in table["8 bit"]["problem"]
    short = report(capsys, "--model", write(GEMMA3), "--memory", "1", "--context", "2000")
    assert any("xKV leaves 34 % of the full cache" in note for note in short["notes"])


def test_window_keeps_one_step_more_while_a_prompt_comes_in():
    cache = CacheBytes(row_bytes=10, max_rows=512, constant_bytes=7)
    assert cache.at(100) == 1007
    assert cache.at(10_000) == 5127
    assert cache.at(10_000, step=2048) == 10 * (512 + 2047) + 7


def test_model_with_nothing_to_compress_says_why(write, capsys):
    found = report(capsys, "--model", write(CONFIGS["mamba2"]), "--memory", "1")
    assert list(rows(found)) == ["full", "8 bit", "4 bit"]
    assert any("mamba2 has no layer with a full KV cache" in note for note in found["notes"])
    at_one, at_many = (
        report(capsys, "--model", write(CONFIGS["mamba2"]), "--context", n) for n in ("1", "4096")
    )
    assert rows(at_one)["full"]["cache_bytes"] == rows(at_many)["full"]["cache_bytes"] > 0


def test_layer_overrides_and_foreign_quantization_count(write):
    plain = {key: value for key, value in LLAMA_8B.items() if key != "quantization"}
    read = {}
    for name, extra in {
        "none": {},
        "mlx": {"quantization": {"group_size": 64, "bits": 4}},
        "head": {
            "quantization": {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}
        },
        "left out": {"quantization": {"group_size": 64, "bits": 4, "lm_head": False}},
        "awq": {"quantization_config": {"quant_method": "awq", "group_size": 64, "bits": 4}},
    }.items():
        read[name] = mlx_metal.read_facts(write(plain | extra), XKVConfig()).weight_bytes
    head = 128_256 * 4096
    assert read["none"] == pytest.approx(2 * 8.03e9, rel=0.001)
    assert read["head"] - read["mlx"] == head // 2
    assert read["left out"] - read["mlx"] == head * (16 - 4.5) / 8
    # embeddings stay as they are, too
    assert read["awq"] - read["mlx"] == 2 * head * (16 - 4.5) / 8


def test_large_config_allocates_nothing(write):
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    facts = mlx_metal.read_facts(write(LLAMA_70B), XKVConfig())
    assert facts.weight_bytes == pytest.approx(39.7e9, rel=0.01)
    assert mx.get_peak_memory() - before < 1e6


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Bytes held and peak of the bundled model in float32, which is fast on a CPU, in one group."""
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text()) | {"dtype": "float32"}
    folder = tmp_path_factory.mktemp("float32")
    (folder / "config.json").write_text(json.dumps(config))
    chosen = XKVConfig(compression=4, group_size=8, power_iterations=1)
    model = mlx_lm.load(str(CHECKPOINT_DIR))[0]
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    prompt = mx.array(np.random.default_rng(0).integers(300, 1000, 3000))
    mlx_metal.enable(model, chosen)
    caches = mlx_lm.models.cache.make_prompt_cache(model)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    steps = generate_step(prompt, model, max_tokens=1, prompt_cache=caches, prefill_step_size=128)
    assert len(list(steps)) == 1
    peak = mx.get_peak_memory() - before
    held = sum(cache.nbytes for cache in caches)
    mlx_metal.disable(model)
    return mlx_metal.read_facts(str(folder), chosen), held, peak


def test_predicted_bytes_agree_with_a_real_run(real_run):
    facts, held, _ = real_run
    assert held == pytest.approx(CompressedCache(facts, 4).cache_bytes(3000), rel=0.03)


def test_predicted_peak_is_a_close_upper_bound_of_a_real_run(real_run):
    facts, _, peak = real_run
    predicted = CompressedCache(facts, 4).peak_bytes(3000, step=128) - facts.weight_bytes
    assert 0.8 * predicted < peak < 1.02 * predicted


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        (None, [], "has no config.json"),
        ("{broken", [], "is not JSON"),
        ("[]", [], "names no model_type"),
        ({"model_type": "no_such_model"}, [], "no_such_model not supported"),
        ({"model_type": "llama"}, [], "mlx-lm cannot build"),
        (LLAMA_8B | {"model_file": "own.py"}, [], "brings code of its own"),
        (LLAMA_8B, ["--memory", "-1"], "--memory -1 must be above 0"),
        (LLAMA_8B, ["--memory", "nan"], "--memory nan must be above 0"),
        (LLAMA_8B, ["--memory", "4"], "the weights alone take 4.52 GB, more than the memory of 4"),
        (LLAMA_8B, ["--compression", "1"], "compression=1.0 must be above 1"),
        (LLAMA_8B, ["--context", "0"], "--context 0 must be at least 1"),
        (LLAMA_8B, ["--group-size", "0"], "group_size=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(write, tmp_path, capsys, config, flags, words):
    folder = str(tmp_path) if config is None else write(config)
    with pytest.raises(SystemExit) as stop:
        plan.main(["--model", folder, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.count("\n") == 1


def test_repository_downloads_only_its_config(write, monkeypatch, capsys):
    folder, asked = write(LLAMA_8B), []

    def download(repository, name):
        asked.append((repository, name))
        if repository == "some/model":
            return f"{folder}/config.json"
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("xkv.backends.mlx_metal.plan.hf_hub_download", download)
    assert report(capsys, "--model", "some/model", "--memory", "9")["model"] == "some/model"
    with pytest.raises(SystemExit):
        plan.main(["--model", "no/model"])
    assert "neither a directory nor a repository" in capsys.readouterr().err
    assert asked == [("some/model", "config.json"), ("no/model", "config.json")]


def test_table_shows_every_cache_and_its_command(capsys):
    plan.main(["--memory", "0.1", "--compression", "4"])
    text = capsys.readouterr().out
    assert "trained for 8,192 tokens" in text and "at 8,192 tokens" in text
    assert "xKV 4 x   python -m xkv.generate --compression 4" in text
    assert "python -m xkv.generate --group-size 0 --kv-bits 8" in text


def test_compression_that_no_rank_reaches_says_that_the_cache_stays_dense():
    facts = mlx_metal.read_facts(str(CHECKPOINT_DIR), XKVConfig())
    cache = CompressedCache(facts, 1e6)
    assert "kept dense" in cache.loses(4096)
    assert cache.first >= SEARCH_LIMIT
    assert cache.cache_bytes(4096) == NativeCache(facts).cache_bytes(4096)
