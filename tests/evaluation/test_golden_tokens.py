"""``scripts/golden_tokens.py``: greedy answers stay what they are, in full and in exact form."""

import os
from dataclasses import replace

import numpy as np
import pytest

from scripts import golden_tokens
from xkv import InputError
from xkv.tiny import CHECKPOINT_DIR

REAL_MODEL = "XKV_SMOLLM2"
"""An environment variable: the folder of ``python -m scripts.real_model``."""


@pytest.fixture(scope="module", params=golden_tokens.BACKENDS)
def engine(request):
    return golden_tokens.load(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def kept():
    return golden_tokens.read(str(CHECKPOINT_DIR))


def test_bundled_model_says_what_it_said(engine, kept):
    assert {golden.name for golden in kept} >= {"chat", "document", "second turn", "numbers"}
    assert golden_tokens.differences(engine, kept) == []


@pytest.mark.parametrize("backend", golden_tokens.BACKENDS)
def test_smollm2_says_what_it_said(backend):
    folder = os.environ.get(REAL_MODEL)
    if not folder:
        pytest.skip(f"{REAL_MODEL} names no folder of SmolLM2 (python -m scripts.real_model)")
    kept = golden_tokens.read(folder)
    assert golden_tokens.differences(golden_tokens.load(backend, folder), kept) == []


@pytest.mark.parametrize("name", ["bundled.json", "smollm2.json"])
def test_kept_answers_are_far_from_ties(name):
    kept = golden_tokens.answers_of(golden_tokens.FOLDER / name)
    assert len(kept) >= 4
    for golden in kept:
        assert golden.margin >= golden_tokens.LEAST_MARGIN
        assert len(golden.tokens) <= golden.limit <= golden_tokens.MAX_TOKENS
        assert golden.limit >= golden_tokens.LEAST_TOKENS


def test_exact_form_is_compressed(engine, kept, monkeypatch):
    """The comparison is with our cache, not with one that stayed dense."""
    details = []
    generate = type(engine).generate

    def watched(*args, **options):
        answer = generate(*args, **options)
        details.append(answer.detail)
        return answer

    monkeypatch.setattr(type(engine), "generate", watched)
    golden_tokens.differences(engine, kept[:1])
    full, exact = details
    assert full is None and "rank_k full, rank_v full" in exact


def test_other_tokens_and_prompts_are_told(engine, kept):
    golden = kept[0]
    other = replace(golden, tokens=[*golden.tokens[:1], 0])
    found = golden_tokens.differences(engine, [other])
    assert len(found) == 2 and all("chat: 'Noted.'" in x and "from token 1 on" in x for x in found)
    assert "full cache" in found[0] and "exact form" in found[1]
    short = golden_tokens.differences(engine, [replace(golden, n_prompt=3)])
    assert short == [f"chat: {golden.n_prompt} tokens, not 3"]


def test_an_answer_is_kept_up_to_a_near_tie(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(golden_tokens, "FOLDER", tmp_path)
    monkeypatch.setattr(golden_tokens, "MAX_TOKENS", 12)
    # of the second prompt's answer too little is left
    ties = {"chat": 12, "document": 3, "code": 9}
    monkeypatch.setattr(golden_tokens, "PROMPTS", dict.fromkeys(ties, "The wind came."))
    apart = [np.where(np.arange(12) < n, 1.0, 1e-3) for n in ties.values()]
    monkeypatch.setattr(golden_tokens, "margins", lambda *args: apart.pop(0))
    golden_tokens.write(str(CHECKPOINT_DIR))
    kept = golden_tokens.read(str(CHECKPOINT_DIR))
    assert [(x.name, x.limit, len(x.tokens)) for x in kept] == [("chat", 12, 12), ("code", 9, 9)]
    assert "document is not usable: a near tie after 3 tokens" in capsys.readouterr().err


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(golden_tokens, "checkpoint_code", lambda folder: "other")
    with pytest.raises(InputError, match="other weights"):
        golden_tokens.read(str(CHECKPOINT_DIR))
