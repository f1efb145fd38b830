"""A server that is killed or ended, and asked again after a restart."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mlx_metal.kept_rows import bytes_of
from tests.serving import Server, float32_model
from xkv.tiny import make_document

DOCUMENT = make_document(1, 1200)
LIMIT_BYTES = 4_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float32_model(tmp_path_factory.mktemp("model") / "float32")


def serving(model: Path, folder: Path, **options: Any) -> Server:
    flags = ["--prompt-cache-dir", str(folder), "--prompt-cache-disk-bytes", str(LIMIT_BYTES)]
    return Server("--model", str(model), *flags, **options)


def asked(server: Server, fact: int) -> tuple[str, int]:
    """The answer to a question about the document, and how many of its tokens were cached."""
    answer = server.ask(f"{DOCUMENT.text} {DOCUMENT.facts[fact].question}")
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].message.content, details.cached_tokens if details else 0


def written(server: Server) -> int:
    """Waits for the writer; returns the bytes on disk."""
    while not (disk := server.memory()["disk"])["conversations"]:
        time.sleep(0.05)
    return disk["held_bytes"]


@pytest.fixture(scope="module")
def answers(model: Path) -> Iterator[list[str]]:
    with Server("--model", str(model)) as server:
        yield [asked(server, fact)[0] for fact in (0, 1)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_conversations_survive(
    tmp_path: Path, model: Path, answers: list[str], end: signal.Signals
) -> None:
    with serving(model, tmp_path) as server:
        assert asked(server, 0) == (answers[0], 0)
        if end == signal.SIGKILL:
            # with SIGTERM what is not yet written is written in the end
            written(server)
        server.process.send_signal(end)
        code = server.process.wait()
    assert code == (0 if end == signal.SIGTERM else -end)
    with serving(model, tmp_path) as server:
        assert server.memory()["disk"]["conversations"] == 1
        text, n_cached = asked(server, 1)
        assert text == answers[1] and n_cached > 1000
        text, n_again = asked(server, 0)
        assert text == answers[0] and n_again > n_cached
        report = server.memory()
        assert report["disk"]["hits"] == 1
        assert 0 < written(server) <= LIMIT_BYTES
        assert 0 < bytes_of(tmp_path) <= LIMIT_BYTES


def test_a_second_server_has_to_take_another_folder(tmp_path: Path, model: Path) -> None:
    with serving(model, tmp_path):
        flags = ["--model", str(model), "--prompt-cache-dir", str(tmp_path), "--port", "0"]
        command = [sys.executable, "-m", "xkv.server", *flags]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith("another process uses it; give each server a folder of its own")
    assert "Traceback" not in run.stderr
