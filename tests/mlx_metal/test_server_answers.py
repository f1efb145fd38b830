"""Where an answer ends, and what it says of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.serving import ANSWER, MESSAGES, Server, chat, text_of
from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.stops import StopText

NO_END = {"2": -100}
"""A bias that keeps the model from ending its answer."""


@pytest.fixture(scope="module", params=[(), ("--group-size", "0")], ids=["compressed", "batched"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    # float16, in which low temperatures overflow; full caches are served in batches
    with Server(*request.param) as running:
        yield running


STOPS = [
    ["pointed"],
    ["sold pointed"],
    ["sold poin"],
    ["oint"],
    ["l s"],
    ["C"],
    [ANSWER],
    ["."],
    ["ladders", "inted"],
    ["pointed hats", "ed l"],
    ["sold pointed hats", "ol"],
    ["nothing of the kind"],
    [""],
]


@pytest.mark.parametrize("stops", STOPS, ids="|".join)
@pytest.mark.parametrize("is_stream", [False, True])
def test_answer_ends_before_the_stop_string(
    server: Server, stops: list[str], is_stream: bool
) -> None:
    options: Any = {"stop": stops, "max_tokens": 60}
    if all(stops):
        options["extra_body"] = {"logit_bias": NO_END} if stops != STOPS[-2] else {}
    client = server.client.chat.completions
    answer = client.create(model="default_model", messages=MESSAGES, stream=is_stream, **options)
    if is_stream:
        *pieces, last = [chunk.choices[0] for chunk in answer]
        text = "".join(x.delta.content or "" for x in [*pieces, last])
        reason = last.finish_reason
    else:
        choice = answer.choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
        assert answer.usage.completion_tokens < 15
    places = [ANSWER.find(stop) for stop in stops if stop and stop in ANSWER]
    assert text == ANSWER[: min(places, default=None)]
    assert reason == "stop"


def test_stop_string_ends_the_generation_and_keeps_its_cache(server: Server) -> None:
    message = {"role": "user", "content": "Greta hid blue candles. What did Greta do?"}
    before = server.memory()["tokens"]
    options = {"messages": [message], "stop": "hid", "max_tokens": 2000, "logit_bias": NO_END}
    answer = chat(server, **options)
    assert text_of(answer) == "Greta "
    usage = answer["usage"]
    assert usage["completion_tokens"] < 4
    # a batch keeps the prompt only
    kept = server.memory()["tokens"] - before
    assert usage["prompt_tokens"] - 1 <= kept <= usage["total_tokens"]


def test_end_is_sent_once_and_only_when_it_is_there() -> None:
    queue: Queue[Any] = Queue()
    wanted = SimpleNamespace(stop_words=[], logprobs=False, top_logprobs=0)
    answers = Answers(queue, wanted, lambda: None)
    answers.send_end()
    answers.put((3, 5))
    assert queue.get_nowait() == (3, 5)
    answers.put(None)
    assert queue.empty()
    assert answers.is_done
    answers.send_end()
    answers.send_end()
    assert queue.get_nowait() is None
    assert queue.empty()


@example(["ab", "x"], ["abc", "b"])
@example(["ab"], ["abc", "b"])
@given(
    pieces=st.lists(st.text("abé🙂", max_size=4), max_size=8),
    stops=st.lists(st.text("abé🙂", max_size=4), max_size=3),
)
def test_stop_text_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop and stop in text]
    stop_text, shown = StopText(stops), ""
    for piece in pieces:
        shown += stop_text.add(piece)
        assert text.startswith(shown)
        if stop_text.is_found:
            break
    else:
        shown += stop_text.end()
    assert shown == text[: min(places, default=None)]
    assert stop_text.is_found == bool(places)


@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-6, 1e-9, 1e-300])
def test_lowest_temperatures_are_greedy(server: Server, temperature: float) -> None:
    for seed in range(3):
        assert text_of(chat(server, temperature=temperature, seed=seed)) == ANSWER


@pytest.mark.parametrize("n_top", [None, 0, 3])
@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_name_the_sampled_tokens(
    server: Server, n_top: int | None, is_stream: bool
) -> None:
    options: Any = {"temperature": 2.0, "seed": 1, "logprobs": True, "top_logprobs": n_top}
    create = server.client.chat.completions.create
    create_options = {"model": "default_model", "messages": MESSAGES, "max_tokens": 12, **options}
    if is_stream:
        chunks = list(create(**create_options, stream=True))
        entries = [
            x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.content
        ]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        (choice,) = create(**create_options).choices
        entries, text = choice.logprobs.content, choice.message.content
    assert len(entries) == 12
    assert "".join(x.token for x in entries).replace(" ", "") == text.replace(" ", "")
    assert not n_top or any(x.logprob < x.top_logprobs[0].logprob for x in entries)
    for entry in entries:
        assert entry.logprob <= 0
        top = [(x.token, x.logprob) for x in entry.top_logprobs]
        assert len(top) == (n_top or 0)
        assert [x for _, x in top] == sorted((x for _, x in top), reverse=True)
        # equal probabilities may leave it out
        assert not top or entry.logprob < top[-1][1] + 1e-6 or (entry.token, entry.logprob) in top
