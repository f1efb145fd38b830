"""A minute of agent-like traffic, and the checks that look at it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.serve_traffic import SLACK_BYTES, Traffic, compared, failures_of

ROOT = Path(__file__).parents[2]


def test_a_minute_of_traffic_leaves_the_server_as_it_should_be() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.serve_traffic", "--minutes", "1", "--scale", "0.05"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 answers equal those of a fresh cache" in done.stdout
    assert "leave-prefill" in done.stdout


class FakeServer:
    """A server that is idle with this much in use."""

    def __init__(self, held: int, active: int, answer: Any = None) -> None:
        self.report = {"sequences": 1, "held_bytes": held, "active_memory_bytes": active}
        self.answer = answer

    def settled_memory(self) -> dict[str, int]:
        return {**self.report, "model_bytes": 1000}

    def request(self, path: str, body: Any) -> Any:
        usage = {"prompt_tokens_details": {"cached_tokens": 0}, "prompt_tokens": 5}
        choice = {"message": {"content": self.answer}}
        return 200, {"choices": [choice], "usage": usage}


@pytest.mark.parametrize(
    ("held", "active", "log", "status", "n_failures"),
    [
        (500, 1500, "", "200", 0),
        (501, 1501, "", "200", 1),
        (500, 1501 + SLACK_BYTES, "", "200", 1),
        (500, 1500, "Traceback (most recent call last):", "200", 1),
        (500, 1500, "", "500", 1),
        (500, 1500, "", "400", 1),
    ],
)
def test_every_check_of_an_idle_server_can_fail(
    held: int, active: int, log: str, status: str, n_failures: int
) -> None:
    server: Any = FakeServer(held, active)
    traffic = Traffic(server, 0.1, 0)
    traffic.statuses[status] += 1
    assert len(failures_of(traffic, 500, log)) == n_failures


def test_other_answer_of_a_fresh_cache_is_told() -> None:
    server: Any = FakeServer(0, 0, "Carl sold ladders.")
    sample: Any = [(SimpleNamespace(), "Carl sold ladders."), (SimpleNamespace(), "Carl sold")]
    assert compared(server, sample) == [
        "answer 'Carl sold' from a reused cache, 'Carl sold ladders.' from a fresh one"
    ]
