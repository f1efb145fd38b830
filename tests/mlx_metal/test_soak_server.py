"""A minute of many clients, and the checks that look at it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scripts import soak_clients
from scripts.fuzz_messages import COUNT, MESSAGE
from scripts.fuzz_requests import TEXT
from scripts.soak_checks import SLACK_BYTES, Idle, Watch, alone, idle_failures, is_tie, log_failures
from scripts.soak_clients import Client
from scripts.soak_requests import BrokenOffError, Chat, Reply, body_of, streamed, whole
from scripts.soak_traffic import GRACE_S, OverError, Traffic
from tests.serving import CHAT, Server
from xkv.backends.mlx_metal.server.messages_request import chat_of

ROOT = Path(__file__).parents[2]
CONVERSATION: Chat = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Read it."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "read", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "Carl sold hats."},
    {"role": "user", "content": "What did Carl sell?"},
]


def test_half_a_minute_of_clients_ends_clean() -> None:
    flags = ["--minutes", "0.5", "--clients", "4", "--scale", "0.3", "--samples", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.soak_server", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 of 6 answers equal those of a lone request" in done.stdout
    assert len(re.findall("Idle: ", done.stdout)) == 4
    assert re.search(r"After the restart: [1-9]\d* conversations from disk", done.stdout)
    last = done.stdout.splitlines()[-1]
    assert all(f"{action}: " in last for action in ("begin", "ask", "malformed"))
    assert not re.search("broken off|lost", last)


class Lone:
    """A server that answers one text, with what it held for likely."""

    def request(self, path: str, body: Any) -> tuple[int, Any]:
        assert path == TEXT and body["logprobs"] and not body["stream"]
        second = {"token": "palace", "logprob": -3.2183}
        entries = [
            {"token": "The", "logprob": -2.8, "top_logprobs": []},
            {"token": "harbor", "logprob": -3.2141, "top_logprobs": [second]},
            {"token": "was", "logprob": -0.1, "top_logprobs": [{"token": "is", "logprob": -2.3}]},
        ]
        return 200, {"choices": [{"logprobs": {"content": entries}}]}


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("The palace was", True), ("The harbor is", False), ("The bridge was", False)],
)
def test_words_that_are_as_likely_are_told_from_others(text: str, is_one: bool) -> None:
    assert is_tie(cast(Server, Lone()), {"prompt": "Once.", "stream": True}, text) == is_one


def test_conversation_is_the_same_in_both_forms() -> None:
    read = chat_of(body_of(MESSAGE, CONVERSATION, True))
    same = body_of(CHAT, CONVERSATION, True)
    assert [x["role"] for x in read["messages"]] == [x["role"] for x in same["messages"]]
    contents = [x["content"] or "" for x in same["messages"]]
    assert [x["content"] for x in read["messages"]] == contents
    names = [[tool["function"]["name"] for tool in x["tools"]] for x in (read, same)]
    assert names[0] == names[1] and len(names[0]) == 3
    assert "tools" not in body_of(MESSAGE, CONVERSATION, False)
    assert body_of(TEXT, CONVERSATION, True)["prompt"] == "\n".join(contents)


def lines(*events: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps(x).encode() + b"\n\n" for x in events) + end


USAGE = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
OWN_USAGE = {"input_tokens": 5, "cache_read_input_tokens": 4}
CHUNKS = (
    {"choices": [{"delta": {"content": "Carl "}}]},
    {"choices": [{"delta": {"content": "sold."}}]},
    {"choices": [], "usage": USAGE},
)
EVENTS = (
    {"type": "message_start", "message": {"usage": {**OWN_USAGE, "cache_read_input_tokens": 0}}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Carl "}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "sold."}},
    {"type": "message_delta", "delta": {}, "usage": OWN_USAGE},
)
STOP = b"event: message_stop\ndata: {}\n\n"


def test_all_forms_of_an_answer_are_read() -> None:
    reply = Reply(200, "Carl sold.", 9, 4)
    choices = {"choices": [{"message": {"content": "Carl sold."}}], "usage": USAGE}
    texts = {"choices": [{"text": "Carl sold."}], "usage": USAGE}
    blocks = {"content": [{"type": "text", "text": "Carl sold."}], "usage": OWN_USAGE}
    assert whole(CHAT, choices) == whole(TEXT, texts) == whole(MESSAGE, blocks) == reply
    assert whole(COUNT, {"input_tokens": 7}) == Reply(200, "7")
    assert streamed(CHAT, b": keepalive 1/2\n\n" + lines(*CHUNKS)) == reply
    assert streamed(MESSAGE, lines(*EVENTS, end=STOP)) == reply


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (CHAT, lines(*CHUNKS, end=b"")),
        (CHAT, lines(*CHUNKS[:2])),
        (CHAT, lines(*CHUNKS, end=b'data: {"choices": [')),
        (CHAT, lines(*CHUNKS[:2], {"error": {"message": "it failed"}})),
        (MESSAGE, lines(*EVENTS, end=b"")),
        (MESSAGE, lines({"type": "error", "error": {"message": "it failed"}}, end=STOP)),
        (MESSAGE, lines(end=STOP)),
    ],
)
def test_answer_that_breaks_off_is_told(path: str, content: bytes) -> None:
    with pytest.raises(BrokenOffError):
        streamed(path, content)


def idle(extra: int = 0, rss: int = 1000) -> Idle:
    report = {"active_memory_bytes": 750 + extra, "model_bytes": 400, "held_bytes": 300}
    report["basis_bytes"] = 50
    return Idle(report, rss)


@pytest.mark.parametrize(
    ("before", "after", "n_failures"),
    [
        (idle(5), idle(SLACK_BYTES + 5, 1100), 0),
        (idle(SLACK_BYTES + 1), idle(), 0),
        (idle(5), idle(SLACK_BYTES + 6), 1),
        (idle(), idle(0, 1101), 1),
    ],
)
def test_idle_server_that_grows_is_told(before: Idle, after: Idle, n_failures: int) -> None:
    assert len(list(idle_failures(before, after))) == n_failures


@pytest.mark.parametrize(
    ("log", "was_full", "n_failures"),
    [
        ("fine", False, 0),
        ("cannot write x: File too large", True, 0),
        ("fine", True, 1),
        ("Traceback (most recent call last):", False, 1),
    ],
)
def test_log_is_read(log: str, was_full: bool, n_failures: int) -> None:
    assert len(list(log_failures(log, was_full))) == n_failures


@pytest.mark.parametrize(
    ("held", "on_disk", "n_failures"), [(100, 50, 0), (101, 50, 1), (100, 51, 1)]
)
def test_bytes_above_a_cap_are_told(
    tmp_path: Path, held: int, on_disk: int, n_failures: int
) -> None:
    (tmp_path / "a").write_bytes(b"x" * on_disk)
    traffic = Traffic()
    server: Any = SimpleNamespace(memory=lambda: {"held_bytes": held, "limit_bytes": 100})
    traffic.open(server)
    watch = Watch(traffic, tmp_path, 50)
    server.memory = lambda found=server.memory: (traffic.stop(), found())[1]
    watch.run()
    assert len(traffic.failures) == n_failures
    assert (watch.n_polls, watch.held_peak, watch.disk_peak) == (1, held, on_disk)


def test_disk_that_is_not_used_again_is_told(tmp_path: Path) -> None:
    traffic = Traffic()
    watch = Watch(traffic, tmp_path, 50)
    report = {"disk": {"written_bytes": 0}}
    watch.check_freed(report)
    assert traffic.failures == []
    watch.was_full = True
    watch.check_freed(report)
    assert len(traffic.failures) == 1


class Fake:
    """A server that only has a port."""

    port = 0


def test_another_answer_to_the_same_request_is_told() -> None:
    traffic = Traffic()
    for body, text in (
        ({"a": 1}, "Carl"),
        ({"a": 2}, "Anna"),
        ({"a": 1, "stream": True}, "Carl"),
    ):
        traffic.keep(CHAT, body, text)
    assert traffic.failures == [] and len(traffic.answers) == 2
    traffic.keep(CHAT, {"a": 1}, "Anna")
    assert len(traffic.failures) == 1


def test_another_answer_to_a_lone_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([Reply(200, "Carl", 9, 0), Reply(200, "Anna", 9, 0), Reply(200, "Carl", 9, 1)])
    monkeypatch.setattr("scripts.soak_checks.exchange", lambda *args: next(replies))
    server: Any = SimpleNamespace(port=0)
    asked = ((CHAT, "{}"), "Carl")
    assert [len(list(alone(server, [asked]))) for _ in range(3)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("found", "n_failures", "status"),
    [
        ([Reply(200, "Carl")], 0, "200"),
        ([Reply(503, ""), Reply(200, "Carl")], 0, "503"),
        ([Reply(500, "")], 1, "500"),
        ([Reply(400, "")], 1, "400"),
        ([BrokenOffError("x")], 1, "broken off"),
        ([ConnectionResetError("x")], 1, "lost"),
    ],
)
def test_every_answer_of_a_client_can_fail(
    monkeypatch: pytest.MonkeyPatch, found: list[Any], n_failures: int, status: str
) -> None:
    monkeypatch.setattr(soak_clients.time, "sleep", lambda seconds: None)

    def exchange(*args: Any) -> Reply:
        reply = found.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    monkeypatch.setattr(soak_clients, "exchange", exchange)
    traffic = Traffic()
    server: Any = Fake()
    traffic.open(server)
    reply = Client(traffic, 0, 1).ask("ask", CHAT, {})
    assert len(traffic.failures) == n_failures and status in traffic.statuses
    assert (reply is None) == bool(n_failures)


def test_request_without_an_answer_is_lost_unless_the_server_was_ending() -> None:
    traffic, server = Traffic(), Fake()
    any_server: Any = server
    now = time.monotonic()
    assert traffic.is_lost(now, any_server)
    traffic.end(any_server)
    assert not traffic.is_lost(time.monotonic() - GRACE_S / 2, any_server)
    assert traffic.is_lost(now - 2 * GRACE_S, any_server)
    other: Any = Fake()
    assert traffic.is_lost(time.monotonic(), other)
    traffic.stop()
    with pytest.raises(OverError):
        traffic.server()
