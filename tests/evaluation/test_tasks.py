"""The evaluation's tasks: lengths, needles, scores, files of the user's own."""

import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from xkv import InputError
from xkv.evaluation.tasks import TASKS, Question, frequent_words
from xkv.evaluation.tasks.perplexity import CONTINUATION_TOKENS, FileText
from xkv.evaluation.tasks.qa import TextQuestions
from xkv.tiny import CHECKPOINT_DIR, make_document


@pytest.fixture(scope="module", params=["bundled", "characters"])
def count(request):
    """Tokens by the bundled tokenizer, and by one that has a token for every four characters."""
    if request.param == "characters":
        return lambda text: -(-len(text) // 4)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("length", [700, 3000])
@pytest.mark.parametrize("task", TASKS)
def test_context_fills_its_length_and_is_seeded(task, length, count):
    sample = TASKS[task](7, length, count)
    # a pair of UUIDs or a block of repeated words may not fit any more
    assert 0.85 * length < count(sample.context) <= length
    assert TASKS[task](7, length, count) == sample
    assert TASKS[task](8, length, count).context != sample.context
    assert sample.task == task and sample.seed == 7 and sample.questions


@pytest.mark.parametrize("task", [task for task in TASKS if task != "ppl"])
def test_right_answers_score_one_and_stand_in_the_context(task, count):
    sample = TASKS[task](3, 2000, count)
    text = " ".join([sample.context, *sample.messages])
    for question in sample.questions:
        assert question.score(question.answer) == 1
        assert question.score("I do not know.") == 0
        assert all(reference in text for reference in question.references)
        # compression must not see what is asked
        assert question.text not in sample.context


@pytest.mark.parametrize("task", ["needle", "multikey", "multivalue", "key_value", "qa"])
def test_each_answer_is_stated_once(task, count):
    sample = TASKS[task](3, 2000, count)
    for question in sample.questions:
        assert all(sample.context.count(reference) == 1 for reference in question.references)


def test_variables_are_reached_from_their_value_only(count):
    sample = TASKS["variables"](11, 2000, count)
    links = dict(re.findall(r"(\w+) -> (\w+)\.", sample.context))
    for question in sample.questions:
        name, reached = question.prefix.split()[0], []
        while name in links:
            name = links[name]
            reached.append(name)
        assert tuple(reached) == question.references


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_words_asked_for_are_the_most_frequent(task, count):
    sample = TASKS[task](5, 3000, count)
    words = Counter(re.findall(r"\w+", sample.context.split("\n\n", 1)[1]))
    question = sample.questions[0]
    first, *_, last = words.most_common(len(question.references) + 1)
    assert {word for word, _ in words.most_common(len(question.references))} == set(
        question.references
    )
    assert first[1] > 2 * last[1]


def test_frequent_words_leave_the_noise_out(count):
    sample = frequent_words.make(5, 3000, count)
    assert sample.context.count("...") > sample.context.count(sample.questions[0].references[0])


def test_conversation_asks_for_nothing_of_the_same_message(count):
    for seed in range(20):
        sample = TASKS["multiturn"](seed, 2000, count)
        assert len(sample.messages) == len(sample.questions) == 5
        told = sample.context
        for message, question in zip(sample.messages, sample.questions, strict=True):
            assert question.references[0] in told
            told += message


def test_too_short_a_length_is_refused_with_what_is_needed(count):
    for task in TASKS:
        if task != "ppl":
            with pytest.raises(InputError, match=r"length of 10 tokens is too short"):
                TASKS[task](0, 10, count)


@pytest.mark.parametrize(
    ("prediction", "needs_all", "score"),
    [("Red  APPLES, pears", True, 1.0), ("red apples", True, 0.5), ("pears", False, 1.0)],
)
def test_score_is_rulers(prediction, needs_all, score):
    question = Question("?", "", "", ("red apples", "pears"), needs_all)
    assert question.score(prediction) == score


def test_questions_over_a_text_are_those_it_answers(tmp_path, count):
    document = make_document(4, 3000, n_facts=30)
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text(document.text)
    lines = [{"question": fact.question, "answers": [fact.said]} for fact in document.facts]
    questions.write_text("\n".join(map(json.dumps, lines)))
    sample = TextQuestions(str(text), str(questions)).make(1, 1000, count)
    assert 1 <= len(sample.questions) <= 16
    assert count(sample.context) <= 1000
    assert all(question.score(sample.context) == 1 for question in sample.questions)


@pytest.mark.parametrize(
    ("text", "questions", "sentence"),
    [
        (None, "", "cannot read"),
        ("", "", "is empty"),
        ("Some text.", '{"question": "Who?"}', "line 1: not a JSON object like"),
        ("Some text.", '\n["Who?"]', "line 2: not a JSON object like"),
        ("Some text.", '{"question": "Who?", "answers": ["Ann"]}', "no answer of"),
        (b"\xff\xfe", "", "not a UTF-8 text"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, text, questions, sentence):
    paths = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    for path, content in zip(paths, (text, questions), strict=True):
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=sentence):
        TextQuestions(*map(str, paths)).make(0, 100, len)


def test_a_text_is_continued_where_it_was_cut(tmp_path, count):
    text = make_document(4, 3000, n_facts=30).text
    (tmp_path / "text.txt").write_text(text)
    task = FileText(str(tmp_path / "text.txt"))
    sample = task.make(0, 800, count)
    assert 700 < count(sample.context) <= 800
    assert CONTINUATION_TOKENS / 2 < count(sample.continuation) <= CONTINUATION_TOKENS
    assert text.startswith(f"{sample.context} {sample.continuation}"[:4000].split("\n")[0])
    assert sample.context + text[len(sample.context)] + sample.continuation in text
    with pytest.raises(InputError, match="and ppl at a length of 9000 needs 9256"):
        task.make(0, 9000, count)
