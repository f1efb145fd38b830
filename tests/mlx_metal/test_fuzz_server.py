"""A slice of the malformed requests, and the checks that look at their answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import fuzz_server
from scripts.fuzz_messages import COUNT, MESSAGE, message_kinds
from scripts.fuzz_requests import Kind, kinds
from tests.serving import ANSWER


def test_malformed_requests_of_many_kinds_are_answered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(SystemExit) as ended:
        fuzz_server.main(["--kinds", "60", "--every", "20", "--json", str(path)])
    shown = capsys.readouterr().out
    assert ended.value.code == 0, shown
    summary = json.loads(path.read_text())
    assert (summary["requests"], summary["kinds"]) == (63, 60)
    assert summary["statuses"]["plain"] == 3
    assert summary["statuses"]["400"] > 10
    assert "63 requests of 60 kinds (" in shown


def test_kinds_are_many_and_named() -> None:
    chosen = [*kinds(4), *message_kinds()]
    names = [kind.name for kind in chosen]
    assert len(names) > 5000
    assert len(set(names)) == len(names)
    for path in (MESSAGE, COUNT):
        asked = [x for x in chosen if x.request.startswith(f"POST {path} ".encode())]
        assert len(asked) > 1500 and all(x.is_message for x in asked)


GOOD_ERROR = b'{"error": {"message": "it is wrong"}}'


@pytest.mark.parametrize(
    ("answer", "status", "fails"),
    [
        (b"HTTP/1.0 400 Bad\r\n\r\n" + GOOD_ERROR, "400", False),
        (b"HTTP/1.0 503 Busy\r\n\r\n" + GOOD_ERROR, "503", False),
        (b"HTTP/1.0 200 OK\r\n\r\n{}", "200", False),
        (b"HTTP/1.0 200 OK\r\n\r\n" + GOOD_ERROR, "200", True),
        (b"HTTP/1.0 500 Bad\r\n\r\n" + GOOD_ERROR, "500", True),
        (b"HTTP/1.0 501 Bad\r\n\r\n" + GOOD_ERROR, "501", True),
        (b"HTTP/1.0 400 Bad\r\n\r\n<html>", "400", True),
        (b'HTTP/1.0 400 Bad\r\n\r\n{"error": {"message": "wrong"}}', "400", True),
        (b'HTTP/1.0 400 Bad\r\n\r\n{"error": "it is wrong"}', "400", True),
        (GOOD_ERROR, "none", True),
        (b"", "closed", True),
    ],
)
def test_every_answer_can_fail(answer: bytes, status: str, fails: bool) -> None:
    outcome = fuzz_server.judged(Kind("a", b""), answer)
    assert outcome.status == status
    assert (outcome.failure is not None) == fails


@pytest.mark.parametrize(
    ("is_message", "body", "fails"),
    [
        (True, b'{"type": "error", "error": {"message": "it is wrong"}}', False),
        (True, GOOD_ERROR, True),
        (False, b'{"type": "error", "error": {"message": "it is wrong"}}', True),
        (True, b'{"type": "error", "error": {"message": "wrong"}}', True),
        (True, b'["type"]', True),
    ],
)
def test_error_is_in_the_form_of_its_path(is_message: bool, body: bytes, fails: bool) -> None:
    kind = Kind("a", b"", is_message=is_message)
    outcome = fuzz_server.judged(kind, b"HTTP/1.0 400 Bad\r\n\r\n" + body)
    assert (outcome.failure is not None) == fails


def test_wrong_plain_answer_is_told() -> None:
    for status, text in ((200, "Carl sold"), (400, ANSWER)):
        answer = {"choices": [{"message": {"content": text}}]}
        server: Any = SimpleNamespace(request=lambda path, body, got=(status, answer): got)
        assert "a plain request is answered" in (fuzz_server.plain(server) or "")
