"""What the server refuses: strangers, other models, what is too large, too slow or too many."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ANSWER, CHAT, LAST_RESORT_S, MESSAGES, Server, float32_model, text_of
from xkv.backends.mlx_metal.server.listening import is_loopback
from xkv.tiny import CHECKPOINT_DIR

KEY = "a-key"
BODY = json.dumps({"messages": MESSAGES, "max_tokens": 12}).encode()
MOST_BYTES = 5000
WARNING = "Warning: whoever reaches 0.0.0.0:"
OUTSIDE = ["--host", "0.0.0.0"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def guarded(log: Path) -> Iterator[Server]:
    """A server with a key, and with small limits."""
    flags = ["--api-key", KEY, "--max-body-bytes", str(MOST_BYTES), "--max-connections", "3"]
    with log.open("wb") as file, Server(*flags, *OUTSIDE, log=file) as running:
        yield running


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that could be loaded."""
    return float32_model(tmp_path_factory.mktemp("model") / "float32")


@pytest.fixture(scope="module")
def hasty(log: Path) -> Iterator[Server]:
    """A server that has no key, and waits a second for a request."""
    with (
        log.with_name("hasty").open("wb") as file,
        Server("--request-timeout", "1", *OUTSIDE, log=file) as running,
    ):
        yield running


def sent(server: Server, request: bytes) -> tuple[int, dict[str, str], Any]:
    """The status, the headers and the JSON that bytes are answered with."""
    with socket.create_connection(("127.0.0.1", server.port), LAST_RESORT_S) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, dict(answer.getheaders()), json.loads(answer.read())


def head(*lines: str, key: str = f"x-api-key: {KEY}") -> bytes:
    return "\r\n".join((*lines, key, "", "")).encode()


def message_of(answer: Any) -> str:
    """An error's sentence, in OpenAI's form."""
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    assert " " in error["message"]
    return error["message"]


KEYS = {
    "bearer": ({"Authorization": f"Bearer {KEY}"}, 200),
    "lower-case": ({"authorization": f"bearer {KEY}"}, 200),
    "own-header": ({"x-api-key": KEY}, 200),
    "one-of-two": ({"Authorization": "Bearer none", "x-api-key": KEY}, 200),
    "none": ({}, 401),
    "wrong": ({"Authorization": f"Bearer {KEY}s"}, 401),
    "begun": ({"Authorization": f"Bearer {KEY[:-1]}"}, 401),
    "empty": ({"Authorization": "Bearer ", "x-api-key": ""}, 401),
    "basic": ({"Authorization": f"Basic {KEY}"}, 401),
    "bare": ({"Authorization": KEY}, 401),
    "not-ascii": ({"x-api-key": "clé"}, 401),
}


@pytest.mark.parametrize("name", KEYS)
def test_requests_need_the_key(guarded: Server, name: str) -> None:
    headers, wanted = KEYS[name]
    lines = [f"{header}: {value}" for header, value in headers.items()]
    request = head(f"POST {CHAT} HTTP/1.1", f"Content-Length: {len(BODY)}", *lines, key="A: b")
    status, fields, answer = sent(guarded, request + BODY)
    assert status == wanted, answer
    if wanted == 200:
        assert text_of(answer) == ANSWER
    else:
        assert "'Authorization: Bearer KEY' or 'x-api-key: KEY'" in message_of(answer)
        assert answer["error"]["code"] == "invalid_api_key"
        assert fields["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/xkv/memory", "/health/", "/health?", "/none"])
def test_only_the_health_is_told_without_a_key(guarded: Server, path: str) -> None:
    assert guarded.request(path)[0] == 401
    assert guarded.request("/health") == (200, {"status": "ok"})
    assert sent(guarded, head(f"GET {path} HTTP/1.1"))[0] in (200, 404)


BODIES = {
    "missing": ([], 411, "no Content-Length"),
    "empty": (["Content-Length:"], 400, "no number of bytes"),
    "word": (["Content-Length: five"], 400, "no number of bytes"),
    "negative": (["Content-Length: -1"], 400, "no number of bytes"),
    "signed": (["Content-Length: +5"], 400, "no number of bytes"),
    "underscore": (["Content-Length: 1_0"], 400, "no number of bytes"),
    "two": (["Content-Length: 5", "Content-Length: 6"], 400, "no number of bytes"),
    "above": ([f"Content-Length: {MOST_BYTES + 1}"], 413, "--max-body-bytes allows 5000"),
    "huge": (["Content-Length: " + "9" * 5000], 413, "--max-body-bytes allows 5000"),
    "chunks": (["Transfer-Encoding: chunked"], 411, "in chunks"),
    "both": (["Transfer-Encoding: chunked", "Content-Length: 5"], 411, "in chunks"),
    "lines": (["A: b"] * 101, 431, "more than 100 headers"),
    "long": (["A: " + "b" * 70_000], 431, "more than 65536 bytes"),
}


@pytest.mark.parametrize("name", BODIES)
def test_size_is_looked_at_before_the_body_is_read(guarded: Server, name: str) -> None:
    lines, status, message = BODIES[name]
    # a server that waited for the body would wait for ever
    answer = sent(guarded, head(f"POST {CHAT} HTTP/1.1", *lines))
    assert answer[0] == status
    assert message in message_of(answer[2])


def test_client_that_sends_too_much_still_gets_the_answer(guarded: Server) -> None:
    request = head(f"POST {CHAT} HTTP/1.1", "Content-Length: 9000000")
    status, _, answer = sent(guarded, request + b" " * 9_000_000)
    assert status == 413
    assert "the body has 9000000 bytes" in message_of(answer)


def test_largest_body_is_served(guarded: Server) -> None:
    request = head(f"POST {CHAT} HTTP/1.1", f"Content-Length: {MOST_BYTES}")
    status, _, answer = sent(guarded, request + BODY.ljust(MOST_BYTES))
    assert (status, text_of(answer)) == (200, ANSWER)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "get", "BREW"])
def test_other_methods_are_refused_in_a_sentence(guarded: Server, method: str) -> None:
    status, fields, answer = sent(guarded, head(f"{method} {CHAT} HTTP/1.1"))
    assert (status, fields["Allow"]) == (405, "GET, POST, OPTIONS")
    assert message_of(answer) == f"there is no method '{method}' here: use GET or POST"


@pytest.mark.parametrize(
    "line", ["GET /none HTTP/1.1", "GET /v1/modelsx HTTP/1.1", "GET / HTTP/0.9"]
)
def test_unknown_paths_are_refused_in_a_sentence(guarded: Server, line: str) -> None:
    status, _, answer = sent(guarded, head(line))
    assert status == 404
    assert "no such path" in message_of(answer)


def test_more_clients_than_places_are_told_to_come_back(guarded: Server) -> None:
    address = "127.0.0.1", guarded.port
    idle = [socket.create_connection(address, LAST_RESORT_S) for _ in range(3)]
    # those before this test may not have left yet
    for _ in range(100):
        status, fields, answer = sent(guarded, b"GET /health HTTP/1.1\r\n\r\n")
        if status == 503:
            break
        time.sleep(0.1)
    assert (status, fields["Retry-After"]) == (503, "1")
    assert answer["error"]["message"] == (
        "--max-connections 3 clients are served at the moment: try again"
    )
    assert answer["error"]["type"] == "server_error"
    for connection in idle:
        connection.close()
    for _ in range(100):
        if sent(guarded, b"GET /health HTTP/1.1\r\n\r\n")[0] == 200:
            break
        time.sleep(0.1)
    else:
        pytest.fail("places are not given back")


def test_clients_beyond_those_who_are_told_are_closed(guarded: Server) -> None:
    address = "127.0.0.1", guarded.port
    # those without a place stay a second
    crowd = [socket.create_connection(address, LAST_RESORT_S) for _ in range(40)]
    closed = 0
    for connection in crowd[6:]:
        try:
            closed += connection.recv(1) == b""
        except ConnectionError:
            closed += 1
    assert closed
    for connection in crowd:
        connection.close()


@pytest.mark.parametrize("start", [b"", b"POST ", BODY[:20]], ids=["silent", "in-head", "in-body"])
@pytest.mark.parametrize("drips", [False, True])
def test_slow_clients_are_let_go(hasty: Server, start: bytes, drips: bool) -> None:
    if start == BODY[:20]:
        start = head(f"POST {CHAT} HTTP/1.1", f"Content-Length: {len(BODY)}") + start
    with socket.create_connection(("127.0.0.1", hasty.port), 60) as connection:
        connection.sendall(start)
        answer = b""
        for _ in range(600 if drips else 1):
            connection.settimeout(0.1 if drips else 60)
            try:
                answer = connection.recv(1)
                break
            except ConnectionResetError:
                break
            except TimeoutError:
                connection.sendall(b"x")
        else:
            pytest.fail("the server waits for a minute")
        if answer:
            connection.settimeout(LAST_RESORT_S)
            answer += b"".join(iter(lambda: connection.recv(1000), b""))
    if b"POST /" in start:
        assert b" 408 " in answer
        assert b"did not arrive within --request-timeout" in answer
    else:
        assert answer == b""


NAMES = [
    "../../etc",
    "/etc",
    "~",
    ".",
    "",
    "org/name",
    "file:///etc/passwd",
    "default_model/..",
    "\n",
]


@pytest.mark.parametrize("field", ["model", "adapters", "draft_model"])
def test_no_other_model_is_loaded(guarded: Server, other_model: Path, field: str) -> None:
    # the last one would load
    for name in [*NAMES, str(other_model)]:
        for path, asked in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "a"})):
            body = json.dumps({**asked, field: name}).encode()
            request = head(f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}")
            status, _, answer = sent(guarded, request + body)
            assert (status, answer["error"]["code"]) == (404, "model_not_found"), name
            assert message_of(answer) == (
                f"{field} {name!r} is not served here: leave it out, or start the server with "
                "--allow-models"
            )


def test_only_the_own_model_is_listed(guarded: Server) -> None:
    listed = sent(guarded, head("GET /v1/models?limit=5 HTTP/1.1"))[2]["data"]
    assert [x["id"] for x in listed] == [str(CHECKPOINT_DIR.resolve())]


def test_open_server_is_warned_of(guarded: Server, hasty: Server, log: Path) -> None:
    assert log.with_name("hasty").read_text().count(WARNING) == 1
    assert WARNING not in log.read_text()


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [(x, False) for x in ("0.0.0.0", "::", "", "192.168.1.5", "example.org")],
)
def test_loopback_is_told_from_other_addresses(host: str, is_own: bool) -> None:
    assert is_loopback(host) == is_own
