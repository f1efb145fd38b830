"""The task ``kl``: what it says of methods whose answer is known, and of exact ones."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from xkv import evaluate
from xkv.cache import steps
from xkv.evaluation.kl import KL, Divergence, Text, compare
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.evaluation.prefills import BLOCK, Prefills, make_prefill
from xkv.evaluation.run import Setting, make_settings
from xkv.evaluation.store import Store
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

LENGTH, N_NEXT = 300, 96


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def torch_model():
    return load_language_model("torch", str(CHECKPOINT_DIR))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(make_document(3, 450).text)
    return str(path)


@pytest.fixture(scope="module")
def text(model):
    return Text("story", tuple(model.encode(make_document(3, 450).text)), 3)


@dataclass(frozen=True)
class LayerWithoutValues(Method):
    """A planted fault: the first layer's values are gone."""

    name = "faulty"
    has_free_size = False

    def compress(self, document, ratio) -> Compressed:
        values = list(document.values)
        values[0] = values[0] * 0
        return compressed_rows(document, document.dense_bytes, document.keys, values)


def run(model, text, folder, methods=(), ratios=(4.0,), more=()):
    """Results by method."""
    settings = [*make_settings(methods, ratios), *more]
    prefills = Prefills(folder / "prefills", model, "tiny")
    with Store(str(folder), {"model": "tiny"}) as store:
        Divergence(model, [text], [LENGTH], settings, N_NEXT, prefills).run(
            store, lambda n, x: None
        )
        return {line["method"]: line for line in store.lines()}


def test_reference_is_what_the_model_says(model, text):
    """Out of all tokens at once, without any cache of ours."""
    plain_model = load_language_model("mlx", str(CHECKPOINT_DIR)).model
    tokens = text.tokens[: LENGTH + N_NEXT]
    prefill = make_prefill(model, tokens[:LENGTH], tokens[LENGTH:], 0)
    logits = plain_model(mx.array([tokens]))[0, LENGTH:].astype(mx.float32)
    want = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert prefill.reference.shape == want.shape and prefill.reference.dtype == np.float32
    np.testing.assert_allclose(prefill.reference, want, atol=2e-3)
    assert str(prefill.document.keys[0].dtype).endswith("float16")


def test_divergence_is_nothing_for_exact_rows_and_rises_with_fewer_bits(model, text, tmp_path):
    by_bits = {"quantized": (8, 4, 2), "lloydmax": (6, 4, 2)}
    families = [[f"{name}:bits={x}" for x in bits] for name, bits in by_bits.items()]
    exact = "xkv:rank_k=full,rank_v=full,latent_bits=16"
    lines = run(model, text, tmp_path, [*families[0], *families[1], exact, "random"])
    control = lines["full"]
    assert 0 < control["kl"] < 1e-6 and control["same_top"] == 1
    assert abs(control["nll"] - control["full_nll"]) < 1e-4
    assert lines[exact]["kl"] < 1e-5
    for labels in families:
        found = [lines[label] for label in labels]
        assert [x["kl"] for x in found] == sorted(x["kl"] for x in found)
        held = [x["held_bytes"] for x in found]
        assert held == sorted(held, reverse=True)
        assert found[0]["kl"] > 10 * control["kl"] and found[-1]["kl"] > 30 * found[0]["kl"]
    assert lines["random"]["kl"] > 0.2 and lines["random"]["same_top"] < 0.9
    for line in lines.values():
        assert line["kl_median"] <= line["kl_q99"] and line["n_next"] == N_NEXT


def test_a_layer_without_values_stands_out(model, text, tmp_path):
    faulty = Setting("faulty", LayerWithoutValues(), None)
    lines = run(model, text, tmp_path, ["quantized:bits=4"], more=[faulty])
    assert lines["faulty"]["kl"] > 100 * lines["quantized:bits=4"]["kl"]
    assert lines["faulty"]["nll"] > lines["faulty"]["full_nll"] + 0.05


def test_selected_rows_are_chosen_for_each_token(torch_model, tmp_path):
    text = Text("story", tuple(torch_model.encode(make_document(3, 450).text)), 3)
    options = "group_size=4,compression=2,budget=32,window=16"
    labels = [f"xkv:{options},attention={kind}" for kind in ("exact", "auto")]
    exact, chosen = (run(torch_model, text, tmp_path, labels)[label] for label in labels)
    assert chosen["kl"] > exact["kl"] > 0


def test_tokens_go_one_by_one_through_the_cache_of_a_reply(torch_model, tmp_path, monkeypatch):
    """Whose tail is folded."""
    text = Text("story", tuple(torch_model.encode(make_document(3, 450).text)), 3)
    folded, fold = [], steps.fold
    monkeypatch.setattr(steps, "fold", lambda *args: folded.append(args[-1]) or fold(*args))
    run(torch_model, text, tmp_path, ["xkv:group_size=4,compression=2,budget=64,max_tail=32"])
    # of two groups
    assert folded == [32] * 2 * (N_NEXT // 32 - 1)


def test_methods_that_cannot_are_told(torch_model, tmp_path):
    text = Text("story", tuple(torch_model.encode(make_document(3, 450).text)), 3)
    lines = run(torch_model, text, tmp_path, ["snapkv-query", "xkv"], ratios=[60.0])
    assert "it looks at a question" in lines["snapkv-query"]["problem"]
    assert "can be reached" in lines["xkv"]["problem"]


def test_distributions_are_compared_in_blocks(torch_model, tmp_path, monkeypatch):
    text = Text("story", tuple(torch_model.encode(make_document(3, 450).text)), 3)
    sizes = []
    original = type(torch_model).log_probabilities

    def spy(self, tokens, layers, one_by_one):
        sizes.append(len(tokens))
        return original(self, tokens, layers, one_by_one)

    monkeypatch.setattr(type(torch_model), "log_probabilities", spy)
    run(torch_model, text, tmp_path)
    assert sizes == [BLOCK, N_NEXT - BLOCK] * 2


def test_compare_is_the_textbook():
    full, other = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.log([[0.25, 0.5, 0.25]] * 2)
    kl, is_same, nll, full_nll = compare(full.astype("f4"), other.astype("f4"), [2])
    want = [0.5 * np.log(2) - 0.25 * np.log(2), 0.1 * np.log(0.4) + 0.2 * np.log(0.4)]
    assert kl == pytest.approx([want[0], want[1] + 0.7 * np.log(2.8)], rel=1e-6)
    assert is_same.tolist() == [False, False]
    assert (nll[0], full_nll[0]) == pytest.approx((np.log(4), np.log(4)))
    again = compare(full.astype("f4"), full.astype("f4"), [2, 0])
    assert not again[0].any() and again[1].all() and len(again[2]) == 2


def command(*flags):
    lengths = ["--lengths", "200", "--continuation", "64", "--backend", "torch"]
    evaluate.main(["--tasks", KL, *lengths, *flags])


def test_command_writes_a_row_a_text_and_their_mean(text_file, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(make_document(5, 300).text)
    out = tmp_path / "out"
    methods = ["--methods", "quantized:bits=4", "xkv", "--ratios", "2", "3"]
    command("--text", text_file, str(other), "--out", str(out), *methods)
    printed = capsys.readouterr()
    assert "## 200 tokens, mean of 2 texts" in printed.out
    assert "| xkv at 3x | 3.0" in printed.out and "full in the KV dtype (control)" in printed.out
    assert "kl.md, kl.csv, kl.png" in printed.err
    assert (out / "kl.png").stat().st_size > 10_000
    rows = list(csv.DictReader((out / "kl.csv").open()))
    settings = [(x["method"], x["ratio"]) for x in rows if x["text"] == "mean"]
    assert settings == [("full", ""), ("quantized:bits=4", ""), ("xkv", "2"), ("xkv", "3")]
    assert len(rows) == 3 * len(settings)
    mean, *each = [float(x["kl"]) for x in rows[::-1] if x["method"] == "quantized:bits=4"]
    assert mean == pytest.approx(sum(each) / 2, rel=1e-4)
    before = (out / "results.jsonl").read_text()
    command("--text", text_file, str(other), "--out", str(out), *methods)
    assert (out / "results.jsonl").read_text() == before
    command("--text", text_file, "--out", str(out), *methods, "--continuation", "32")
    after = (out / "results.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 4
    command("--text", text_file, str(other), "--out", str(out), *methods)
    assert (out / "results.jsonl").read_text() == after


def test_other_tasks_go_on_beside_it(text_file, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--tasks", "needle", "ppl", KL, "--samples", "1", "--methods", "quantized:bits=4"]
    command("--text", text_file, "--out", str(out), "--lengths", "150", *flags)
    printed = capsys.readouterr()
    assert ", summary.png, tasks.json, kl.md, kl.csv, kl.png, kl.json" in printed.err
    assert {x["task"] for x in csv.DictReader((out / "summary.csv").open())} == {"needle", "ppl"}
    assert len(list(csv.DictReader((out / "kl.csv").open()))) == 2


def test_no_plot_where_nothing_has_a_score(tmp_path, capsys):
    flags = ["--tasks", "ppl", "--samples", "1", "--methods", "quantized:bits=4"]
    command("--out", str(tmp_path), *flags)
    assert "results.jsonl, summary.md, summary.csv, tasks.json; " in capsys.readouterr().err


def test_default_methods_are_known():
    settings = make_settings(evaluate.kl.METHODS, evaluate.kl.RATIOS)
    assert settings[0].label == "full"
    ratios = [x.ratio for x in settings if x.label == "xkv:attention=exact"]
    assert ratios == [4, 6, 8, 12, 16]
    assert len(settings) == 1 + 4 + 3 + 5 + 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --text FILE"),
        (["--text", "/nowhere"], "cannot read /nowhere"),
        (["--text", "FILE", "--lengths", "500"], "has 450 tokens, and kl needs 564"),
        (["--text", "FILE", "--continuation", "1"], "--continuation 1 must be at least 2"),
        (["--text", "FILE", "FILE", "--tasks", "kl", "ppl"], "--text names 2 files, and ppl takes"),
        (["--text", "FILE", "--prefills", "/proc/no"], "cannot write to /proc/no"),
        (["--text", "FILE", "--tasks", "riddles"], "tasks: single, needle, .*ppl, kl, hits"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, text_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command(
            *["--out", str(tmp_path / "out"), "--methods", "rotating"],
            *[text_file if x == "FILE" else x for x in flags],
        )
    assert ended.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert re.search(sentence, error[0])
