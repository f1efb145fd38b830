"""Which rows are told as rebuilt, against planted scores and runs that nobody watches."""

from __future__ import annotations

import numpy as np
import pytest

from xkv import XKVConfig
from xkv.checks.set_plots import repeated
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method
from xkv.evaluation.methods.lowrank import IndexedPrefix, compressed_cache
from xkv.evaluation.prefix import Prefix
from xkv.evaluation.working_set import watch
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

# layer 7 is in no group; eight tokens later the tail is folded
CONFIG = XKVConfig(
    groups=((0, 1, 2), (3, 4, 5, 6)), rank_k=40, rank_v=56, window=24, max_tail=8, kept_share=0.5
)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def document(model):
    return model.prefill(model.context_tokens(make_document(seed=4, n_tokens=600).text), seed=0)


def test_what_is_seen_is_what_runs_unwatched(model, document, monkeypatch):
    story = watch(model, document, compressed_cache(document, CONFIG), 12)
    assert story["why_not"] is None and [x["layer"] for x in story["layers"]] == [0, 3, 6]

    backend, chosen = document.backend, []
    choose_rows = backend.choose_rows

    def spy(worth, count):
        rows = choose_rows(worth, count)
        chosen.append(np.sort(backend.to_numpy(rows)[0]) + CONFIG.sinks)
        return rows

    monkeypatch.setattr(backend, "choose_rows", spy)
    unwatched = compressed_cache(document, CONFIG)
    keys, values = (document.widen(x[7]) for x in (document.keys, document.values))
    layers = [*unwatched.layers.values(), Prefix(backend, keys, values, document.n_tokens)]
    opening = model.question_tokens("", "")
    tokens = list(opening)
    for step in range(len(opening) + 12):
        logits = model.forward([[tokens[step]]], layers, last_only=True)
        if len(tokens) == step + 1:
            tokens.append(int(np.argmax(backend.to_numpy(logits)[0, -1])))
    assert story["tokens"] == [model.decode([token]) for token in tokens[:-1]]
    assert story["n_opening"] == len(opening)
    for told in story["layers"]:
        rows = unwatched.layers[told["layer"]].rows
        assert (told["start"], told["end"]) == (rows.start, rows.start + rows.n_segment)
        assert told["start"] < told["recent"] == told["end"] - rows.n_recent < told["end"]
        # the fold came
        assert told["end"] > document.n_tokens - CONFIG.window
        mine = [x.tolist() for x in chosen[told["layer"] :: len(unwatched.layers)]]
        assert [list(step) for step in zip(*told["heads"], strict=True)] == mine


def test_planted_scores_are_told_as_they_are(model, document, monkeypatch):
    """Of rows of which the first are always wanted most, the first are rebuilt, again and again."""
    backend = document.backend

    def first_are_best(absorbed, latent, offsets, n_kv_heads):
        worth = -np.arange(latent.shape[1], dtype=np.float32)
        return backend.from_numpy(np.tile(worth, (1, n_kv_heads, 1)))

    monkeypatch.setattr(backend, "index_scores", first_are_best)
    cache = compressed_cache(document, CONFIG)
    rows = cache.groups[0].layers[0]
    n_rebuilt = CONFIG.rebuilt_at(rows.n_segment, rows.n_recent)
    assert n_rebuilt is not None
    for layer in watch(model, document, cache, 4)["layers"]:
        for head in layer["heads"]:
            assert all(x == list(range(rows.start, rows.start + n_rebuilt)) for x in head)
            assert repeated(head) == [1] * (len(head) - 1)


@pytest.mark.parametrize(("n_tokens", "have_own"), [(5, True), (9, False)])
def test_a_short_question_sees_what_it_would_token_by_token(model, document, n_tokens, have_own):
    """In the evaluation's form, which answers many questions at once, as in the product's."""
    small = "xkv:rank_k=40,rank_v=56,window=24,budget=60,kept_share=0"
    tokens = model.question_tokens("What did Linda do, and where did she go?", "")[:n_tokens]
    together, alone = (parse_method(small).compress(document, None).layers(False) for _ in range(2))
    assert any(isinstance(layer, IndexedPrefix) for layer in together)
    got = model.backend.to_numpy(model.forward([tokens], together, last_only=True))
    for token in tokens:
        want = model.backend.to_numpy(model.forward([[token]], alone, last_only=True))
    error = relative_error(got, want)
    assert error < 4e-6 if have_own else error > 1e-2


def test_rows_that_repeat_are_counted():
    assert repeated([[1, 2], [2, 7], [3, 4], [3, 4]]) == [0.5, 0, 1]
