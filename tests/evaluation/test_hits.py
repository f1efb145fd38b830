"""The tasks ``hits``: what is said and asked, what the scenarios do to a cache, and tables."""

import csv
import json
from itertools import pairwise

import pytest

from xkv import evaluate
from xkv.cache.lowrank_cache import LayerCache
from xkv.checks.tolerances import relative_error
from xkv.evaluation.hits import conversation
from xkv.evaluation.hits.conversation import TASKS
from xkv.evaluation.hits.run import ANSWERS, HITS, Hits
from xkv.evaluation.hits.scenarios import SCENARIOS, branched, play, say
from xkv.evaluation.methods import parse_method
from xkv.evaluation.run import make_settings
from xkv.evaluation.store import Store
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR

LENGTH = 400
EXACT = "xkv:rank_k=full,rank_v=full,window=16,group_size=2,attention=exact"
SMALL = "xkv:compression=3,group_size=8"


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def talk(model):
    return conversation.make(evaluate.FIRST_SEED, LENGTH, model.count)


@pytest.fixture(scope="module")
def document(model, talk):
    return model.prefill(model.context_tokens(talk.context), talk.seed)


@pytest.fixture
def opened(model, document, talk):
    """Layers after the document and the opening, by a method's label."""

    def make(label):
        layers = parse_method(label).compress(document, None).converse().layers
        for turn, exchange in enumerate(talk.opening):
            say(model, layers, exchange, turn)
        return layers

    return make


def logits(model, layers, talk):
    """After a question that stays in a copy."""
    question = talk.questions["recall"]
    tokens = model.question_tokens(question.text, question.prefix, turn=1)
    return model.backend.to_numpy(model.forward([tokens], branched(layers), last_only=True))


def n_stored(layers):
    return [layer.rows.n_segment for layer in layers if isinstance(layer, LayerCache)]


def test_conversation_is_seeded_and_answers_stand_where_they_belong(model, talk):
    assert conversation.make(evaluate.FIRST_SEED, LENGTH, model.count) == talk
    assert conversation.make(5, LENGTH, model.count).context != talk.context
    assert tuple(talk.questions) == TASKS
    for task, question in talk.questions.items():
        (reference,) = question.references
        assert question.score(question.answer) == 1
        is_recall = task == "recall"
        assert talk.context.count(reference) == (not is_recall)
        assert (reference in talk.opening[-1][1]) == is_recall
        # what is taken back says otherwise of all that is asked
        about = question.text.removeprefix("What is the ").rstrip("?")
        assert f"{about[0].upper()}{about[1:]}:" in talk.edited[0]
        assert reference not in "".join(talk.edited)


@pytest.mark.parametrize(
    ("said", "whole", "value"),
    [
        (" 1234567}}", 1, 1),
        ("1234567 } } and so on", 1, 1),
        (" 1234567", 0, 1),
        (" 1234567. The road", 0, 1),
        (" 1234568}}", 0, 0),
        (' "1234567"}}', 0, 0),
        (" 1234567.0}}", 1, 1),
        (" 12345678}}", 0, 0),
        (' 1234567, "more": 1}}', 0, 1),
        (" 1234567}", 0, 1),
        (" 01234567}}", 0, 0),
        ("", 0, 0),
        (" the number is 1234567}}", 0, 0),
        (" {", 0, 0),
    ],
)
def test_a_tool_call_is_valid_and_right(said, whole, value):
    call, closed = (
        conversation._tool_call("number", "Anna", "1234567", closing) for closing in ("", "}}")
    )
    assert json.loads(call.prefix + call.answer) == {
        "name": "note",
        "arguments": {"Magic number of Anna": 1234567},
    }
    assert (call.score(said), closed.score(said)) == (whole, value)


def test_folded_moves_the_tail_into_the_store_twice_and_more(model, talk, opened):
    layers = opened(SMALL)
    sizes = [n_stored(layers)]
    for exchange in talk.later:
        say(model, layers, exchange, 1)
        sizes.append(n_stored(layers))
    n_folds = sum(before < after for before, after in pairwise(sizes))
    assert len(sizes[0]) == 8 and n_folds >= 2
    again = play("folded", model, branched(opened(SMALL)), talk)
    assert n_stored(again) == sizes[-1]


@pytest.mark.parametrize("label", ["full", SMALL])
def test_fresh_and_branches_leave_layers_as_they_are(model, talk, opened, label):
    layers = opened(label)
    before, n_tokens = logits(model, layers, talk), layers[0].offset
    twin = branched(layers)
    play("folded", model, twin, talk)
    assert twin[0].offset > n_tokens == layers[0].offset
    assert (logits(model, play("fresh", model, layers, talk), talk) == before).all()


@pytest.mark.parametrize("label", ["full", SMALL])
def test_a_file_gives_the_same_layers(model, talk, opened, label):
    layers = opened(label)
    loaded = play("file", model, layers, talk)
    assert not {id(layer) for layer in loaded} & {id(layer) for layer in layers}
    assert [type(layer) for layer in loaded] == [type(layer) for layer in layers]
    assert n_stored(loaded) == n_stored(layers)
    want, got = (logits(model, x, talk) for x in (layers, loaded))
    # a model's basis comes from its own file again, which the evaluation had rounded to 16 bits
    assert relative_error(got, want) < 3e-3


@pytest.mark.parametrize("label", ["full", EXACT])
def test_an_edited_message_is_forgotten(model, talk, opened, label):
    layers = opened(label)
    want, n_tokens = logits(model, layers, talk), layers[0].offset
    after = play("edited", model, layers, talk)
    assert {layer.offset for layer in after} == {n_tokens}
    assert relative_error(logits(model, after, talk), want) < 1e-5


def test_an_edit_reaches_into_what_is_stored(model, talk, opened, monkeypatch):
    layers, seen = opened(SMALL), []
    trim = LayerCache.trim

    def watched(layer, n_tokens):
        seen.append((n_tokens, layer.rows.n_tail))
        return trim(layer, n_tokens)

    monkeypatch.setattr(LayerCache, "trim", watched)
    play("edited", model, layers, talk)
    assert len(seen) == 8
    assert all(n_tokens > n_tail for n_tokens, n_tail in seen)


def test_each_question_is_asked_alone(model, talk, opened):
    layers = opened("full")
    n_tokens = layers[0].offset
    answers = Hits(model, [LENGTH], [], 1, talk.seed)._ask(talk, layers)
    assert [answer["task"] for answer in answers] == list(TASKS)
    assert layers[0].offset == n_tokens


def run(model, folder, methods, ratios=(3.0,)):
    hits = Hits(model, [LENGTH], make_settings(methods, ratios), 1, evaluate.FIRST_SEED)
    with Store(str(folder), {}) as store:
        hits.run(store, lambda n, what: None)
        return {line["method"]: line for line in store.results()}


def test_exact_form_answers_as_the_full_cache_after_everything(model, tmp_path):
    found = run(model, tmp_path, [EXACT])
    answers = {name: line["answers"] for name, line in found.items()}
    assert len(answers["full"]) == ANSWERS
    assert [(x["scenario"], x["task"]) for x in answers["full"]] == [
        (scenario, task) for scenario in SCENARIOS for task in TASKS
    ]
    assert answers["full"] == answers[EXACT]
    for answer in answers["full"]:
        # the bundled model cannot close a call
        assert answer["score"] == (answer["task"] != "tool_call"), answer


def test_a_run_goes_on_and_tells_what_cannot_be_done(model, tmp_path):
    first = run(model, tmp_path, ["snapkv-query"])
    assert "looks at a question" in first["snapkv-query"]["problem"]
    lines = (tmp_path / "results.jsonl").read_text()
    assert run(model, tmp_path, ["snapkv-query"]) == first
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_command_writes_tables_and_a_record(tmp_path, capsys):
    flags = ["--tasks", HITS, "single", "--samples", "1", "--lengths", str(LENGTH)]
    methods = ["--methods", "xkv", "quantized:bits=4", "--ratios", "3", "900"]
    evaluate.main([*flags, *methods, "--backend", "torch", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "tasks.json, hits.md, hits.csv, hits.json; " in printed.err
    assert "| tool_call * | full | 0.0% | 0.0% | 0.0% | 0.0% |" in printed.out
    assert "| needle | full | 100.0% | 100.0% | 100.0% | 100.0% |" in printed.out
    assert "| recall | xkv at 900x | – | – | – | – |" in printed.out
    assert "1 questions a cell" in printed.out
    rows = json.loads((tmp_path / "hits.json").read_text())["rows"]
    assert len(rows) == len(list(csv.DictReader((tmp_path / "hits.csv").open()))) == 4 * ANSWERS
    about = {"task": "needle", "scenario": "file", "method": "full", "ratio": None}
    assert {**about, "length": LENGTH, "n": 1, "score": 1.0, "problem": None} in rows
    assert {row["method"] for row in rows if row["problem"]} == {"xkv"}
    others = json.loads((tmp_path / "tasks.json").read_text())["rows"]
    assert {row["task"] for row in others} == {"single"}
