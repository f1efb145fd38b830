"""Speculative decoding out of two compressed caches: its tokens, what of them the draft made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

import xkv
from tests.serving import ANSWER, LAST_RESORT_S, Server, chat, float32_model, text_of
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import generate
from xkv.backends.mlx_metal.model.drafts import DraftCount
from xkv.cache import steps
from xkv.tiny import make_document

DOCUMENT = make_document(seed=11, n_tokens=700)
QUESTION = f"{DOCUMENT.text} {DOCUMENT.facts[2].question}"
OPTIONS: Any = {"compression": 3, "group_size": 8, "window": 24, "attention": "exact"}
N_TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float32_model(tmp_path_factory.mktemp("model") / "float32")


@pytest.fixture(scope="module")
def random_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = ARCHITECTURES["llama"] | {"num_hidden_layers": 2}
    return write_checkpoint(tmp_path_factory.mktemp("draft"), small)


@pytest.fixture
def foreign_draft(random_draft: Path) -> Iterator[Path]:
    """As many tokens as the model has, of which two stand for each other's text."""
    file = random_draft / "tokenizer.json"
    before = file.read_text()
    tokenizer = json.loads(before)
    words = tokenizer["model"]["vocab"]
    words[101], words[102] = words[102], words[101]
    file.write_text(json.dumps(tokenizer))
    yield random_draft
    file.write_text(before)


@pytest.fixture(params=["itself", "random"])
def models(request: Any, path: Path, random_draft: Path) -> Iterator[tuple[Any, nn.Module]]:
    """The model with its tokenizer, and its draft model, both compressed."""
    loaded = mlx_lm.load(str(path))
    draft = mlx_lm.load(str(path if request.param == "itself" else random_draft))[0]
    for model in (loaded[0], draft):
        xkv.enable(model, **OPTIONS)
    yield loaded, draft
    for model in (loaded[0], draft):
        xkv.disable(model)


def test_tokens_are_those_of_the_model_alone(models: Any, request: Any) -> None:
    (model, tokenizer), draft = models
    messages = [{"role": "user", "content": QUESTION}]
    prompt = mx.array(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    want = [int(x) for x, _ in generate_step(prompt, model, max_tokens=N_TOKENS)]
    assert len(set(want)) > 5
    cache = [x for each in (model, draft) for x in make_prompt_cache(each)]
    count, got = DraftCount(3, N_TOKENS), []
    options: Any = {"num_draft_tokens": 3, "prompt_cache": cache}
    for token, _, from_draft in speculative_generate_step(
        prompt, model, draft, max_tokens=N_TOKENS, **options
    ):
        got.append(int(token))
        count.count(from_draft)
    assert got == want
    assert all(x.layer.is_compressed for x in cache)
    acceptance = count.n_taken / count.n_drafted
    if request.node.callspec.params["models"] == "itself":
        assert acceptance == 1
    else:
        assert acceptance < 0.1


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_tokens_are_those_of_one_by_one_where_the_next_is_unsure(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draft attends to the rows that it would alone, and rows are stored as they would."""
    folds, fold = [], steps.fold

    def spy(backend: Any, config: Any, state: Any, n_rows: int) -> Any:
        if config.compression == 8:
            folds.append((state.layers[0].offset, n_rows))
        return fold(backend, config, state, n_rows)

    monkeypatch.setattr(steps, "fold", spy)
    model, draft = (mlx_lm.load(str(path))[0] for _ in range(2))
    tokenizer = mlx_lm.load(str(path))[1]
    prompt = mx.array(tokenizer.encode(make_document(seed, 1000).text)[:700])
    for each, ratio in ((model, 8), (draft, 16)):
        xkv.enable(each, compression=ratio, max_tail=32)
    want = [int(x) for x, _ in generate_step(prompt, model, max_tokens=100)]
    one_by_one, folds[:] = list(folds), []
    cache = [x for each in (model, draft) for x in make_prompt_cache(each)]
    found = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=3, max_tokens=100, prompt_cache=cache
    )
    got, taken = zip(*((int(token), is_draft) for token, _, is_draft in found), strict=True)
    assert list(got) == want
    assert folds == one_by_one and len(folds) > 2
    assert 40 < sum(taken) < 75
    layer = cache[0].layer
    assert layer.rows.n_segment >= 700 and layer.rows.n_recent > 0
    for each in (model, draft):
        xkv.disable(each)


@pytest.mark.parametrize(
    ("n_at_a_time", "max_tokens", "tokens", "n_drafted"),
    [
        (3, 100, "", 0),
        (3, 100, "DDDm", 3),
        (3, 100, "m", 3),
        (3, 100, "Dm" + "m" + "DDDm", 9),
        # the answer ends in the middle
        (3, 100, "DDDmDD", 5),
        # no more are drafted than the answer may have
        (3, 6, "DDDmm", 5),
        (3, 5, "DDDmD", 4),
        (0, 100, "mmm", 0),
    ],
)
def test_count(n_at_a_time: int, max_tokens: int, tokens: str, n_drafted: int) -> None:
    count = DraftCount(n_at_a_time, max_tokens)
    for token in tokens:
        count.count(token == "D")
    assert (count.n_tokens, count.n_taken) == (len(tokens), tokens.count("D"))
    assert count.n_drafted == n_drafted


def test_generate_tells_what_was_accepted(capsys: Any, path: Path, random_draft: Path) -> None:
    for draft, accepted in ((path, "5 of 5 tokens accepted (100.0%)"), (random_draft, "0 of ")):
        flags = ["--model", str(path), "--draft-model", str(draft), "--num-draft-tokens", "3"]
        generate.main([*flags, "-p", QUESTION, "-m", "12", "--compare", "--compression", "3"])
        assert capsys.readouterr().out.count(f"\nDrafts: {accepted}") == 2
    generate.main(["--model", str(path), "-p", "What?", "-m", "2"])
    assert "Drafts" not in capsys.readouterr().out


def test_another_tokenizer_is_told(capsys: Any, path: Path, foreign_draft: Path) -> None:
    sentence = f"the draft model {foreign_draft} has another tokenizer than the model"
    flags = ["--model", str(path), "--draft-model", str(foreign_draft)]
    with pytest.raises(SystemExit) as stop:
        generate.main([*flags, "-p", "What?", "-m", "2"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
    run = subprocess.run(
        [sys.executable, "-m", "xkv.server", *flags],
        stderr=subprocess.PIPE,
        text=True,
        timeout=LAST_RESORT_S,
    )
    assert run.returncode == 2 and sentence in run.stderr and "Traceback" not in run.stderr


def test_the_server_counts(path: Path, tmp_path: Path) -> None:
    flags = ["--model", str(path), "--draft-model", str(path), "--num-draft-tokens", "3"]
    with (tmp_path / "log").open("wb") as log, Server(*flags, log=log) as server:
        assert server.memory()["drafts"] == {
            "answers": 0,
            "drafted": 0,
            "accepted": 0,
            "acceptance": None,
            "decode_tps": None,
        }
        for _ in range(2):
            assert text_of(chat(server)) == ANSWER
        counts = server.memory()["drafts"]
    assert counts["answers"] == 2 and counts["acceptance"] == 1 and counts["decode_tps"] > 0
    assert counts["drafted"] == counts["accepted"] > 4
    lines = [x for x in (tmp_path / "log").read_text().splitlines() if "Drafts: " in x]
    assert len(lines) == 2 and all("(100.0%), " in x and "tokens-per-sec" in x for x in lines)
