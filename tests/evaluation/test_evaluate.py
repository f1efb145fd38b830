"""``python -m xkv.evaluate``: what it measures is what the model says, and a run can go on."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache as make_native_cache

from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, XKVConfig, evaluate
from xkv.backends.mlx_metal import attention_seam, make_prompt_cache
from xkv.checks.tolerances import relative_error
from xkv.evaluation.run import ROOM, Evaluation, make_settings
from xkv.evaluation.store import RESULTS, Store
from xkv.evaluation.summary import collect
from xkv.evaluation.tasks import TASKS
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR

LENGTH = 500


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def mlx_model():
    return load_language_model("mlx", str(CHECKPOINT_DIR))


def run(model, folder, tasks=("multikey",), methods=(), n_questions=4, ratios=(2.0,)):
    """Results of a small evaluation, by method."""
    evaluation = Evaluation(
        model,
        {task: TASKS[task] for task in tasks},
        [LENGTH],
        make_settings(methods, ratios),
        n_questions,
        evaluate.FIRST_SEED,
    )
    with Store(str(folder), {"model": "tiny"}) as store:
        evaluation.run(store, lambda n, what: None)
        return {line["method"]: line for line in store.lines()}


def greedy(model, tokens, n_tokens):
    """The ordinary greedy continuation by mlx-lm, to the end token."""
    answer = []
    for token, _ in generate_step(mx.array(tokens), model.model, max_tokens=n_tokens):
        if token in model.end_tokens:
            break
        answer.append(token)
    return model.decode(answer)


def test_full_cache_says_what_the_model_says(mlx_model, model, tmp_path):
    """Both backends' batched answers over 16-bit rows are mlx-lm's own, question by question."""
    sample = TASKS["multikey"](evaluate.FIRST_SEED, LENGTH, model.count)
    context = model.context_tokens(sample.context)
    answers = run(model, tmp_path)["full"]["answers"]
    assert len(answers) == 4
    for question, answer in zip(sample.questions, answers, strict=False):
        tokens = context + model.question_tokens(question.text, question.prefix)
        said = greedy(mlx_model, tokens, model.count(question.answer) + ROOM)
        assert said == answer["prediction"]
        assert answer["score"] == question.score(said)


def test_random_keys_score_near_zero_and_the_full_cache_does_not(model, tmp_path):
    results = run(model, tmp_path, methods=["random"], n_questions=8)
    scores = {
        name: np.mean([answer["score"] for answer in line["answers"]])
        for name, line in results.items()
    }
    assert scores["full"] >= 0.75
    assert scores["random"] <= 0.125


@pytest.mark.parametrize("task", ["needle", "multivalue", "multiquery", "variables", "qa"])
def test_bundled_model_can_do_the_task(mlx_model, task, tmp_path):
    answers = run(mlx_model, tmp_path, (task,), n_questions=6)["full"]["answers"]
    assert np.mean([answer["score"] for answer in answers]) > 0.8


@pytest.mark.parametrize("attention", ["exact", "auto"])
def test_batched_answers_are_those_of_the_real_cache(mlx_model, attention):
    """A method's rows and batches against the project's own cache, token by token."""
    options = {"compression": 2.0, "group_size": 4, "attention": attention}
    if attention == "auto":
        # what is kept drifts from what is chosen anew
        options |= {"budget": 64, "kept_share": 0.0}
    (setting,) = make_settings([f"xkv:{','.join(f'{k}={v}' for k, v in options.items())}"], [])[1:]
    sample = TASKS["multikey"](evaluate.FIRST_SEED + 1, LENGTH, mlx_model.count)
    tokens = mlx_model.context_tokens(sample.context)
    document = mlx_model.prefill(tokens, 0)
    questions = [mlx_model.question_tokens(q.text, q.prefix) for q in sample.questions]
    compressed = setting.method.compress(document, None)
    batched = mlx_model.generate(questions, compressed.start(), 6)
    for question, answer in zip(questions, batched, strict=True):
        cache = make_prompt_cache(mlx_model.model, XKVConfig(**options))
        for layer, keys, values in zip(cache, document.keys, document.values, strict=True):
            layer.update_and_fetch(keys.astype(mx.float32), values.astype(mx.float32))
        cache[0].layer.cache.settle()
        cache[4].layer.settle()
        assert all(layer.layer.is_compressed for layer in cache)
        with attention_seam():
            real, x = [], mx.array([question])
            for _ in range(6):
                x = mx.argmax(mlx_model.model(x, cache=cache)[:, -1:], axis=-1)
                if x.item() in mlx_model.end_tokens:
                    break
                real.append(x.item())
        assert real == answer


def test_backends_agree(mlx_model, tmp_path):
    methods = ["xkv", "quantized:bits=4", "snapkv"]
    torch_model = load_language_model("torch", str(CHECKPOINT_DIR))
    mine, reference = (
        run(model, tmp_path / name, ("multikey", "multiturn", "ppl"), methods, n_questions=2)
        for name, model in (("mlx", mlx_model), ("torch", torch_model))
    )
    lines = [
        [json.loads(line) for line in (tmp_path / name / RESULTS).read_text().splitlines()]
        for name in ("mlx", "torch")
    ]
    assert mine.keys() == reference.keys()
    for a, b in zip(*lines, strict=True):
        assert a["held_bytes"] == pytest.approx(b["held_bytes"], rel=1e-3)
        if "nll" in a:
            assert a["nll"] == pytest.approx(b["nll"], abs=2e-3)
            assert a["kl"] == pytest.approx(b["kl"], abs=2e-3)
        else:
            assert [x["prediction"] for x in a["answers"]] == [
                x["prediction"] for x in b["answers"]
            ]


@pytest.mark.parametrize("name", ["llama-yarn", "qwen3", "phi3-su", "gemma"])
def test_other_architectures_answer_as_in_mlx_lm(name, tmp_path):
    """At full rank, so that inverse rotations and the methods' rows are exact too."""
    path = write_checkpoint(tmp_path / "model", ARCHITECTURES[name])
    random_model = load_language_model("mlx", str(path))
    exact = "xkv:rank_k=full,rank_v=full,window=16,group_size=2,attention=exact"
    results = run(random_model, tmp_path / "out", methods=[exact])
    sample = TASKS["multikey"](evaluate.FIRST_SEED, LENGTH, random_model.count)
    tokens = random_model.context_tokens(sample.context)
    for i, question in enumerate(sample.questions[:2]):
        asked = random_model.question_tokens(question.text, question.prefix)
        want = greedy(random_model, tokens + asked, random_model.count(question.answer) + ROOM)
        for method in ("full", exact):
            assert results[method]["answers"][i]["prediction"] == want


def test_ropes_that_change_with_the_length_are_undone_call_by_call(tmp_path):
    path = write_checkpoint(tmp_path, ARCHITECTURES["llama-dynamic"])
    random_model = load_language_model("mlx", str(path))
    document = random_model.prefill(list(range(300, 1000)), 0)
    assert len(document.rope_runs(0)) == len(document.call_ends) == 2
    label = "xkv:rank_k=full,rank_v=full,window=16,group_size=1,attention=exact"
    (setting,) = make_settings([label], [])[1:]
    layers = setting.method.compress(document, None).start()
    for layer, keys in zip(layers, document.keys, strict=True):
        assert relative_error(np.array(layer.prefix_keys), np.array(keys)) < 1e-5


def test_models_whose_attention_is_out_of_reach_are_refused(tmp_path):
    path = write_checkpoint(tmp_path, ARCHITECTURES["gemma2"])
    with pytest.raises(InputError, match="gemma2 cannot be evaluated: all layers must have"):
        load_language_model("mlx", str(path))


def test_rows_are_held_in_the_checkpoints_dtype(model):
    assert str(model.kv_dtype).endswith("float16")
    assert str(model.dtype).endswith("float32")
    document = model.prefill(model.encode("Time passed."), 0)
    assert document.dense_bytes == document.n_tokens * 8 * 2 * 2 * 64 * 2


def test_conversation_is_the_one_that_mlx_lm_has(mlx_model, tmp_path):
    sample = TASKS["multiturn"](evaluate.FIRST_SEED, LENGTH, mlx_model.count)
    answers = run(mlx_model, tmp_path, ("multiturn",))["full"]["answers"]
    cache = make_native_cache(mlx_model.model)
    tokens = mlx_model.context_tokens(sample.context)
    for turn, (message, question) in enumerate(zip(sample.messages, sample.questions, strict=True)):
        tokens += mlx_model.question_tokens(question.text, question.prefix, message, turn)
        reply = []
        for token, _ in generate_step(
            mx.array(tokens), mlx_model.model, prompt_cache=cache, max_tokens=24
        ):
            if token in mlx_model.end_tokens:
                break
            reply.append(token)
        assert mlx_model.decode(reply) == answers[turn]["prediction"]
        tokens = []


def test_turns_of_a_conversation_are_compressed_too(mlx_model, tmp_path):
    lines = run(mlx_model, tmp_path, ("multiturn",), ["xkv:compression=2,window=16,max_tail=16"])
    line = lines["xkv:compression=2,window=16,max_tail=16"]
    assert line["dense_bytes"] > 1.5 * line["tokens"] * 8 * 2 * 2 * 64 * 2
    assert line["dense_bytes"] / line["held_bytes"] > 1.8


def test_perplexity_is_that_of_the_whole_text(mlx_model, tmp_path):
    sample = TASKS["ppl"](evaluate.FIRST_SEED, LENGTH, mlx_model.count)
    line = run(mlx_model, tmp_path, ("ppl",), ["xkv", "random"], n_questions=1)
    tokens = mlx_model.context_tokens(sample.context)
    rest = mlx_model.encode(sample.continuation)
    logits = mlx_model.model(mx.array([tokens + rest]))[0, len(tokens) : -1]
    losses = (
        mx.logsumexp(logits, -1) - mx.take_along_axis(logits, mx.array(rest[1:])[:, None], -1)[:, 0]
    )
    assert line["full"]["nll"] == pytest.approx(losses.mean().item(), abs=1e-3)
    assert line["full"]["kl"] == 0
    assert 0 < line["xkv"]["kl"] < line["random"]["kl"]


def test_interrupted_run_goes_on_without_repeating(mlx_model, tmp_path, monkeypatch):
    prefills = []
    original = type(mlx_model).prefill

    def prefill(self, tokens, seed):
        prefills.append(seed)
        if len(prefills) == 3:
            raise KeyboardInterrupt
        return original(self, tokens, seed)

    monkeypatch.setattr(type(mlx_model), "prefill", prefill)
    with pytest.raises(KeyboardInterrupt):
        run(mlx_model, tmp_path, ("needle",), ["rotating"], n_questions=12)
    before = (tmp_path / RESULTS).read_text()
    assert len(before.splitlines()) == 4
    run(mlx_model, tmp_path, ("needle",), ["rotating"], n_questions=12)
    after = (tmp_path / RESULTS).read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 8
    seeds = [evaluate.FIRST_SEED + i for i in (0, 1, 2, 2, 3)]
    assert prefills == seeds


def test_more_questions_complete_the_last_document(mlx_model, tmp_path):
    for n_questions in (2, 5):
        run(mlx_model, tmp_path, ("needle",), ["rotating"], n_questions=n_questions)
        with Store(str(tmp_path), {"model": "tiny"}) as store:
            assert {len(cell.scores) for cell in collect(store.results())} == {n_questions}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tasks", "riddles"], "there is no task 'riddles'"),
        (["--methods", "magic"], "method 'magic' is unknown"),
        (["--methods", "xkv:colour=3"], "has no option 'colour'"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--ratios", "1"], "--ratios 1 must be above 1"),
        (["--lengths", "0"], "--lengths 0 must be at least 1"),
        (["--questions", "q.jsonl"], "give --text"),
        (["--text", "t.txt", "--tasks", "qa"], "needs --questions"),
        (["--text", "/nowhere", "--tasks", "ppl"], "cannot read /nowhere"),
        (["--model", "/nowhere/at/all"], "neither a directory nor a repository"),
        (["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--tasks", "needle", "--lengths", "20"], "a length of 20 tokens is too short"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and sentence in error[0]
