"""The bundled checkpoint: its loaders, its vocabulary and its answers with the full cache."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest
import transformers

from xkv.tiny import CHECKPOINT_DIR, make_document
from xkv.tiny.documents import NAMES, count_tokens, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


@pytest.fixture(scope="module")
def model():
    model, _ = mlx_lm.load(str(CHECKPOINT_DIR))
    model.set_dtype(mx.float32)
    return model


def test_every_word_of_the_documents_is_one_token(tokenizer):
    for word in vocabulary():
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


@pytest.mark.parametrize("n_tokens", [64, 500, 4096])
def test_make_document_meets_its_length_and_states_its_facts(tokenizer, n_tokens):
    document = make_document(1, n_tokens)
    assert len(tokenizer.encode(document.text, add_special_tokens=False)) == n_tokens
    assert count_tokens(document.text) == n_tokens
    assert all(document.text.count(fact.answer[:-1]) == 1 for fact in document.facts)
    assert make_document(1, n_tokens) == document != make_document(2, n_tokens)


def test_make_document_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        make_document(0, 50, n_facts=40)
    with pytest.raises(ValueError, match="n_facts"):
        make_document(0, 5000, n_facts=len(NAMES) + 1)


def test_checkpoint_is_small_and_keeps_its_rope_base_for_both_loaders():
    size = sum(path.stat().st_size for path in CHECKPOINT_DIR.iterdir())
    assert size < 16e6
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    "text", ["Anna sold blue hats.", "naïve 漢字 🙂 x=3", "One,  two\n\nthree"]
)
def test_tokenizer_round_trip_but_for_white_space(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens) == " ".join(text.split())


@pytest.mark.parametrize("n_facts", [1, 20])
def test_model_answers_every_question_of_an_unseen_document(model, tokenizer, n_facts):
    """Teacher-forced: every token of each answer is the model's own first choice."""
    document = make_document(seed=314, n_tokens=500, n_facts=n_facts)
    messages = [{"role": "user", "content": f"{document.text} {document.facts[0].question}"}]
    for fact in document.facts[1:]:
        messages += [
            {"role": "assistant", "content": ""},
            {"role": "user", "content": fact.question},
        ]
    for message, fact in zip(messages[1::2], document.facts, strict=False):
        message["content"] = fact.answer
    messages.append({"role": "assistant", "content": document.facts[-1].answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    choices = mx.argmax(model(mx.array([tokens]))[0], axis=-1).tolist()
    start = tokenizer.convert_tokens_to_ids("<|assistant|>")
    answers = [tokens.index(tokenizer.eos_token_id, i) for i, t in enumerate(tokens) if t == start]
    begins = [i for i, token in enumerate(tokens) if token == start]
    assert len(begins) == n_facts
    for begin, end in zip(begins, answers, strict=True):
        assert choices[begin:end] == tokens[begin + 1 : end + 1]
