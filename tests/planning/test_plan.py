"""``python -m xkv.plan``: from config.json alone, hand-computed bytes and those of a real run."""

from __future__ import annotations

import gc
import json

import mlx.core as mx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.architectures import CONFIGS
from xkv import XKVConfig, plan
from xkv.backends import mlx_metal
from xkv.planning.chips import CHIPS, MODELS, milliseconds
from xkv.planning.decode_cost import working_set
from xkv.planning.footprint import NativeCache

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


def test_decode_times_are_arithmetic_on_named_chips(write, capsys):
    flags = ["--model", write(LLAMA_8B), "--memory", "12", "--compression", "4", "8"]
    found = report(capsys, *flags)
    times = {(entry["chip"], entry["tokens"]): entry["ms"] for entry in found["decode"]}
    assert len(times) == len(CHIPS) * 3
    assert list(times["M3 Max", 8192]) == ["full", "xKV 4 x", "xKV 8 x"]
    # weights and 32 layers' rows at 400 GB/s, and three launches a layer
    for n_tokens in (8192, 32768, 131072):
        read = (found["weight_bytes"] + 131_072 * n_tokens) / 400e9
        launches = 32 * 3 * 3e-6
        assert times["M3 Max", n_tokens]["full"] == pytest.approx(1e3 * (read + launches))
    # the same layer as the named one's, but for weights that are not read
    model, config = MODELS["Llama-3.1-8B"], XKVConfig(compression=8)
    layer = model.layer(config, 32768)
    for chip in CHIPS:
        parts = working_set(layer, config, 32768, chip.is_metal)
        ms = milliseconds(chip, parts, 32, found["weight_bytes"])
        assert times[chip.name, 32768]["xKV 8 x"] == pytest.approx(ms)
    plan.main(flags)
    text = capsys.readouterr().out
    assert "arithmetic, not measured" in text and "M3 Max      131,072" in text


def test_decode_times_end_with_the_trained_context_and_count_windows(write, capsys):
    found = report(capsys, "--model", write(GEMMA3), "--memory", "1")
    assert {entry["tokens"] for entry in found["decode"]} == {8192, 32768}
    windows, row_bytes = 4 * 512, 2 * 2 * 64 * 2
    read = (found["weight_bytes"] + row_bytes * (2 * 32_768 + windows)) / 400e9
    times = {(x["chip"], x["tokens"]): x["ms"] for x in found["decode"]}
    full = times["M3 Max", 32768]["full"]
    # two layers of the group and four with a window: three launches each
    assert full == pytest.approx(1e3 * (read + 6 * 3 * 3e-6))
    short = report(capsys, "--model", write(GEMMA3 | {"max_position_embeddings": 4096}))
    assert {entry["tokens"] for entry in short["decode"]} == {4096}


@pytest.mark.parametrize("name", ["mamba2", "glm4_moe_lite"])
def test_no_decode_times_where_nothing_is_compressed_or_values_stay_dense(write, capsys, name):
    assert report(capsys, "--model", write(CONFIGS[name]), "--memory", "1")["decode"] == []


def test_trained_context_is_named_as_the_limit(write, capsys):
    table = rows(report(capsys, "--model", write(LLAMA_8B), "--memory", "64"))
    assert {entry["limited_by"] for entry in table.values()} == {"training"}
    assert {entry["longest_context"] for entry in table.values()} == {131_072}


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


def test_quantized_attention_holds_the_scores_of_a_step(write, capsys):
    folder = write(LLAMA_8B)
    cache = NativeCache(mlx_metal.read_facts(folder, XKVConfig()), 8)
    scores = 32 * 2048 * 65_536 * 2
    held = cache.facts.weight_bytes + cache.cache_bytes(65_536)
    assert scores < cache.peak_bytes(65_536) - held < 1.1 * scores
    notes = report(capsys, "--model", folder, "--memory", "9")["notes"]
    assert any(note.startswith("8.590 GB of the 8 and 4 bit peaks are scores") for note in notes)


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

    monkeypatch.setattr("xkv.backends.mlx_metal.model.plan.hf_hub_download", download)
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
