"""What is noted of working sets, against planted scores and runs that nobody watches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xkv import XKVConfig
from xkv.checks.set_plots import held_rows, returned_rows
from xkv.evaluation.methods.lowrank import compressed_cache
from xkv.evaluation.prefix import Prefix
from xkv.evaluation.working_set import watch
from xkv.ops.working_set import SWAP_STEPS
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

# layer 7 is in no group; eight tokens later the tail is folded
CONFIG = XKVConfig(
    groups=((0, 1, 2), (3, 4, 5, 6)),
    rank_k=40,
    rank_v=56,
    window=24,
    max_tail=8,
    kept_share=0.5,
)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def document(model):
    return model.prefill(model.context_tokens(make_document(seed=4, n_tokens=600).text), seed=0)


def test_what_is_seen_is_what_runs_unwatched(model, document):
    cache = compressed_cache(document, CONFIG)
    story = watch(model, document, cache, 12)
    assert story["why_not"] is None and [x["layer"] for x in story["layers"]] == [0, 3, 6]

    unwatched = compressed_cache(document, CONFIG)
    keys, values = (document.widen(x[7]) for x in (document.keys, document.values))
    dense = Prefix(document.backend, keys, values, document.n_tokens)
    layers = [*unwatched.layers.values(), dense]
    opening, held = model.question_tokens("", ""), {0: [], 3: [], 6: []}
    for token in opening:
        logits = step(model, layers, token, held)
    texts = [model.decode([token]) for token in opening]
    for _ in range(12):
        choice = int(np.argmax(model.backend.to_numpy(logits)[0, -1]))
        texts.append(model.decode([choice]))
        logits = step(model, layers, choice, held)
    assert story["tokens"] == texts and story["n_opening"] == len(opening)
    for told in story["layers"]:
        rows = unwatched.layers[told["layer"]].rows
        assert (told["start"], told["end"]) == (rows.start, rows.start + rows.n_segment)
        # the fold came, and made room for more
        assert told["end"] > document.n_tokens - CONFIG.window
        for number, head in enumerate(told["heads"]):
            assert len(head["steps"]) == len(texts)
            *_, before = told_sets = list(held_rows(head))
            last = head["steps"][-1]
            told_sets.append(before - set(last["went"]) | set(last["came"]))
            mine, told_after = [sets[number] for sets in held[told["layer"]]], told_sets[1:]
            # what a fold adds before a step is told as what came after the one before it
            (folded,) = [i for i in range(len(mine)) if told_after[i] != mine[i]]
            assert told_after[folded] > mine[folded]
            assert len(told_sets[-1]) == rows.n_kept > len(head["first"])


def step(model, layers, token, held):
    """One step; notes which positions the slots held after it."""
    logits = model.forward([[token]], layers, last_only=True)
    to_numpy = model.backend.to_numpy
    to_numpy(logits)
    for index, sets in held.items():
        rows = layers[index].rows
        sets.append([set((x + rows.start).tolist()) for x in to_numpy(rows.slots.rows)[0]])
    return logits


def test_planted_scores_are_told_as_they_are(model, document, monkeypatch):
    """Of rows of which the first are always wanted most, the set takes up a quarter at a time."""
    backend = document.backend

    def first_are_best(absorbed, latent, offsets, n_kv_heads):
        worth = -np.arange(latent.shape[1], dtype=np.float32)
        return backend.from_numpy(np.tile(worth, (1, n_kv_heads, 1)))

    monkeypatch.setattr(backend, "index_scores", first_are_best)
    config = replace(CONFIG, max_tail=128)
    cache = compressed_cache(document, config)
    n_kept, start = cache.groups[0].layers[0].n_kept, CONFIG.sinks
    n_swaps, end = n_kept // 4, start + cache.groups[0].layers[0].n_segment
    assert n_kept % 4 and 8 < n_swaps < 32
    story = watch(model, document, cache, 2 * SWAP_STEPS)
    for layer in story["layers"]:
        for head in layer["heads"]:
            assert head["first"] == list(range(end - n_kept, end))
            number, at = 0, []
            for step, told in enumerate(head["steps"][: 2 * SWAP_STEPS]):
                low, high = start + number * n_swaps, end - number * n_swaps
                assert told["rebuilt"] == list(range(low, low + 256))
                assert told["at_hand"] == pytest.approx(number * n_swaps / n_kept, abs=1e-4)
                if told["came"]:
                    assert told["came"] == list(range(low, low + n_swaps))
                    assert told["went"] == list(range(high - n_swaps, high))
                    number += 1
                    at.append(step)
                else:
                    assert told["went"] == []
            assert len(at) == 2 and at[1] - at[0] == SWAP_STEPS
            assert not any(returned_rows(head)[: 2 * SWAP_STEPS])


def test_rows_that_come_back_are_counted():
    changes = [([7], [1]), ([1], [2]), ([2, 9], [7, 1])]
    steps = [{"came": came, "went": went} for came, went in changes]
    head = {"first": [1, 2], "steps": steps}
    assert list(held_rows(head)) == [{1, 2}, {2, 7}, {1, 7}]
    assert returned_rows(head) == [0, 1, 1]
