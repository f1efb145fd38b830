"""The page for people, and the counts on it."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from tests.evaluation.browser import NAMES, Browser, find_browser
from tests.serving import LAST_RESORT_S, MESSAGES, Server, chat
from xkv.backends.mlx_metal.server import traffic as traffic_module
from xkv.backends.mlx_metal.server.budget import PromptCache
from xkv.backends.mlx_metal.server.status import page
from xkv.backends.mlx_metal.server.traffic import Traffic
from xkv.cli.terminal import size_text
from xkv.tiny import make_document

KEY = "a-key"
NASTY = "<script>alert(1)</script>\"'{{ 7 * 7 }}"
REPORT: dict[str, Any] = {
    "sequences": 1,
    "held_bytes": 2_000_000,
    "limit_bytes": None,
    "disk": {"written_bytes": 7_000_000, "blocks": 12},
    "requests": {"running": 3, "decode_tps": 71.5},
    "conversations": [{"tokens": 1234, "held_bytes": 2_000_000, "ratio": 2.5, "idle_s": 65.4}],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--prompt-cache-bytes", "30000000") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("wb") as file, Server("--api-key", KEY, log=file) as running:
        yield running


def test_the_models_basis_is_reported_beside_what_prompts_hold(server: Server) -> None:
    server.ask(make_document(3, 900).text, max_tokens=2)
    report = server.memory()
    assert report["held_bytes"] < report["basis_bytes"] < report["model_bytes"]


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    # a BLAS that this process was given ends the browser's
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    program = find_browser()
    if program is None:
        pytest.skip(f"the page is not opened: there is none of {', '.join(NAMES)} here")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


def got(server: Server, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LAST_RESORT_S)
    connection.request("GET", path, headers={x.replace("_", "-"): y for x, y in headers.items()})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"someone:{password}".encode()).decode()


def rows_of(browser: Browser) -> list[list[str]]:
    rows = "[...document.querySelectorAll('tr')].map(x => [...x.cells].map(y => y.innerText))"
    return browser.evaluate(rows)


def test_browser_shows_what_the_report_says(server: Server, browser: Browser) -> None:
    chat(server)
    chat(server)
    report = server.memory()
    url = f"http://127.0.0.1:{server.port}/xkv"
    browser.open(url)
    requests, rows = report["requests"], rows_of(browser)
    assert requests["answered"] >= 2 and requests["with_cached_tokens"] >= 1
    for label, value in (
        ("Answered", requests["answered"]),
        ("With cached tokens", requests["with_cached_tokens"]),
        ("Prompt tokens", requests["prompt_tokens"]),
        ("Cached tokens", requests["cached_tokens"]),
        ("Tokens a second, last answers", requests["decode_tps"]),
        ("Their caches", f"{report['held_bytes'] / 1e6:.3f} MB"),
        ("Cap of both, --prompt-cache-bytes", "30.000 MB"),
    ):
        assert [label, f"{value:,}" if isinstance(value, (int, float)) else value] in rows
    (conversation,) = report["conversations"]
    assert rows[-1][:2] == [str(conversation["tokens"]), size_text(conversation["held_bytes"])]
    text = browser.evaluate("document.body.innerText")
    assert "Carl" not in text and "ladders" not in text
    troubles = "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
    assert browser.told(*troubles) == []
    requested = [x["request"]["url"] for x in browser.told("Network.requestWillBeSent")]
    assert {x for x in requested if not x.startswith("data:")} == {url}
    assert browser.evaluate("document.scripts.length") == 0


def test_page_renews_itself(server: Server, browser: Browser) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/xkv")
    assert browser.told("Page.loadEventFired")
    browser.events.clear()
    chat(server)
    n_answered = server.memory()["requests"]["answered"]
    while not browser.told("Page.loadEventFired"):
        browser.evaluate("1")
        time.sleep(0.1)
    assert ["Answered", str(n_answered)] in rows_of(browser)


def test_browser_gives_the_key_as_a_password(guarded: Server, browser: Browser) -> None:
    browser.open(f"http://someone:{KEY}@127.0.0.1:{guarded.port}/xkv")
    assert browser.evaluate("document.querySelector('h1').innerText").startswith("xkv serves")


@pytest.mark.parametrize(
    ("path", "headers", "status", "asks"),
    [
        ("/xkv", {}, 401, 'Basic realm="xkv"'),
        ("/xkv", {"Authorization": basic("another")}, 401, 'Basic realm="xkv"'),
        ("/xkv", {"Authorization": "Basic é"}, 401, 'Basic realm="xkv"'),
        ("/xkv", {"Authorization": basic(KEY)}, 200, None),
        ("/xkv", {"Authorization": f"Bearer {KEY}"}, 200, None),
        ("/xkv", {"x_api_key": KEY}, 200, None),
        # what other pages could make a browser do with a password that it knows
        ("/xkv/memory", {"Authorization": basic(KEY)}, 401, "Bearer"),
        ("/v1/models", {"Authorization": basic(KEY)}, 401, "Bearer"),
        ("/xkv?", {"Authorization": basic(KEY)}, 401, "Bearer"),
    ],
)
def test_page_needs_the_key(
    guarded: Server, path: str, headers: dict[str, str], status: int, asks: str | None
) -> None:
    found, answered, body = got(guarded, path, **headers)
    assert (found, answered.get("WWW-Authenticate")) == (status, asks)
    assert body.startswith("<!doctype html>") == (status == 200)


def test_page_loads_nothing_and_is_framed_by_none(server: Server) -> None:
    status, headers, _ = got(server, "/xkv")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


def test_nothing_breaks_out_of_the_page() -> None:
    text = page(REPORT | {NASTY: NASTY}, NASTY)
    assert "<script" not in text and "49" not in text and "&lt;script&gt;" in text


def test_page_says_what_is_on_disk_and_when_a_prompt_was_used() -> None:
    text = page(REPORT, "a model")
    for words in (
        "<h2>Disk</h2>",
        '<th scope="row">Written</th><td>7.000 MB</td>',
        '<th scope="row">Blocks</th><td>12</td>',
        "<td>1,234</td><td>2.000 MB</td><td>2.50 x</td><td>1 min 5 s ago</td>",
        "--prompt-cache-bytes</th><td>–</td>",
    ):
        assert words in text
    assert "There are none yet" in page(REPORT | {"conversations": []}, "a model")
    assert "Disk" not in page({k: v for k, v in REPORT.items() if k != "disk"}, "a model")


def test_request_in_an_answer_runs_until_its_client_is_gone(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 400, "logit_bias": {"2": -100}, "stream": True}
    n_before = server.memory()["requests"]["answered"]
    connection = server.post(json.dumps(body).encode())
    with connection, connection.makefile("rb") as lines:
        next(line for line in lines if line.startswith(b"data:"))
        requests = server.memory()["requests"]
    assert (requests["running"], requests["answered"]) == (1, n_before)
    while (requests := server.memory()["requests"])["running"]:
        time.sleep(0.02)
    assert requests["answered"] == n_before + 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A time that goes on when it is told to."""
    now = [10.0]
    monkeypatch.setattr(traffic_module.time, "monotonic", lambda: now[0])
    return now


def filled(n_tokens: int) -> list[KVCache]:
    cache = KVCache()
    cache.update_and_fetch(*[mx.zeros((1, 1, n_tokens, 4))] * 2)
    return [cache]


def test_use_of_a_prompt_is_noted(clock: list[float]) -> None:
    kept = PromptCache(10)

    def idle() -> dict[int, float]:
        return {x["tokens"]: x["idle_s"] for x in kept.report()["conversations"]}

    kept.insert_cache("model", [1, 2, 3, 4], filled(4))
    clock[0] += 7
    kept.insert_cache("model", [9, 8], filled(2))
    assert idle() == {4: 7, 2: 0}
    clock[0] += 1
    kept.fetch_nearest_cache("model", [1, 2, 3, 4, 5])
    assert idle() == {4: 0, 2: 1}


def test_speeds_are_of_what_was_computed(clock: list[float]) -> None:
    traffic = Traffic()
    assert traffic.report()["prefill_tps"] is traffic.report()["decode_tps"] is None
    with traffic.request() as served:
        assert traffic.report()["waiting"] == 1
        clock[0] += 7
        context = SimpleNamespace(prompt=[5] * 100, prompt_cache_count=-1)
        served.begin(context)
        assert (traffic.report()["waiting"], traffic.report()["running"]) == (0, 1)
        context.prompt_cache_count = 40
        clock[0] += 2
        for _ in range(5):
            served.token()
            clock[0] += 0.5
        served.end()
        assert (traffic.report()["running"], traffic.report()["answered"]) == (0, 1)
    assert traffic.report() == {
        "running": 0,
        "waiting": 0,
        "answered": 1,
        "with_cached_tokens": 1,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "answer_tokens": 5,
        "prefill_tps": 60 / 2,
        "decode_tps": 4 / 2,
    }


def test_refused_request_counts_for_nothing() -> None:
    traffic = Traffic()
    before = traffic.report()
    with pytest.raises(ValueError, match="refused"), traffic.request():
        raise ValueError("refused")
    assert traffic.report() == before


def test_requests_that_wait_are_told(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "logit_bias": {"2": -100}, "seed": 1}
    with ThreadPoolExecutor(3) as pool:
        # a seed is for a request by itself
        answers = [pool.submit(chat, server, **body) for _ in range(3)]
        seen = set()
        while not all(x.done() for x in answers):
            requests = server.memory()["requests"]
            seen.add((requests["running"], requests["waiting"]))
            time.sleep(0.02)
    assert (1, 2) in seen
    assert server.memory()["requests"]["waiting"] == 0
