"""What must hold of a server while :mod:`scripts.soak_server` runs, and after it."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from scripts.fuzz_requests import TEXT
from scripts.soak_requests import exchange
from scripts.soak_traffic import OverError, Traffic
from tests.serving import Server

SLACK_BYTES = 8_000_000
"""For what is neither weights nor a cached prompt, and was not there before."""
RSS_SLACK = 1.1
"""How much a process may grow that does the same things again."""
POLL_S = 0.3
TIE = 0.02
"""Difference of log probabilities that rounding makes up for, as it does for rows at full rank."""


class Idle(NamedTuple):
    """A server that nobody asks anything."""

    report: dict[str, Any]
    rss_bytes: int

    @classmethod
    def of(cls, server: Server) -> Idle:
        """Look at it once what clients have left is over, too."""
        while (report := server.settled_memory())["requests"]["running"]:
            time.sleep(0.05)
        shown = subprocess.check_output(["ps", "-o", "rss=", "-p", str(server.process.pid)])
        return cls(report, 1024 * int(shown))

    @property
    def held_bytes(self) -> int:
        return self.report["held_bytes"]

    @property
    def extra_bytes(self) -> int:
        """What MLX has in use besides weights, the model's basis and cached prompts."""
        known = self.report["model_bytes"] + self.report["basis_bytes"] + self.held_bytes
        return self.report["active_memory_bytes"] - known

    def __str__(self) -> str:
        return (
            f"Idle: {self.report['sequences']} prompts in {self.held_bytes / 1e6:.1f} MB, "
            f"{self.extra_bytes / 1e6:.1f} MB besides them, the weights and the basis, "
            f"{self.rss_bytes / 1e6:.0f} MB resident"
        )


def idle_failures(before: Idle, after: Idle) -> Iterator[str]:
    """What has grown between two looks at one server, between which it did what it did before."""
    # a model's own basis is among what it always has
    if after.extra_bytes > before.extra_bytes + SLACK_BYTES:
        yield (
            f"{after.extra_bytes} bytes are neither weights nor cached prompts, and before "
            f"{before.extra_bytes} were"
        )
    if after.rss_bytes > RSS_SLACK * before.rss_bytes:
        yield f"the idle server grew from {before.rss_bytes} to {after.rss_bytes} bytes"


def log_failures(log: str, was_full: bool) -> Iterator[str]:
    """What a log should not say, and what it should where the disk was full."""
    if "Traceback (most recent call last)" in log:
        yield f"a traceback in the log: {log[log.index('Traceback') :][:3000]}"
    if was_full and os.strerror(errno.EFBIG) not in log:
        yield "the log does not say that the disk was full"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder from which some may be deleted meanwhile."""
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


class Watch:
    """Looks at what the server holds all the time, and fills its disk.

    Args:
        traffic: Tells which server is up.
        folder: Of its conversations.
        disk_limit: Most bytes there.
    """

    def __init__(self, traffic: Traffic, folder: Path, disk_limit: int) -> None:
        self.traffic, self.folder, self.disk_limit = traffic, folder, disk_limit
        self.n_polls = self.held_peak = self.disk_peak = 0
        self.was_full = False
        self._limits = resource.RLIM_INFINITY, resource.RLIM_INFINITY
        self._written_full = 0

    def run(self) -> None:
        """Poll until the traffic is over."""
        while not self.traffic.is_over:
            try:
                self._poll(self.traffic.server().memory())
            except OverError:
                return
            except (OSError, HTTPException):
                # it is ending
                pass
            time.sleep(POLL_S)

    def _poll(self, report: dict[str, Any]) -> None:
        self.n_polls += 1
        held = report["held_bytes"]
        self.held_peak = max(self.held_peak, held)
        if held > report["limit_bytes"]:
            self.traffic.fail(f"{held} bytes are held, and {report['limit_bytes']} are allowed")
        # a file that is renamed meanwhile may be seen under both names
        on_disk = min(folder_bytes(self.folder) for _ in range(3))
        self.disk_peak = max(self.disk_peak, on_disk)
        if on_disk > self.disk_limit:
            self.traffic.fail(f"{on_disk} bytes are on disk, and {self.disk_limit} are allowed")

    def fill_disk(self, server: Server) -> None:
        """Let the server write no more into any file."""
        if not hasattr(resource, "prlimit"):
            print("The disk is not filled, as this system limits no other process's files")
            return
        self.was_full = True
        pid = server.process.pid
        self._limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, self._limits[1]))

    def free_disk(self, server: Server) -> None:
        """Let it write again."""
        if self.was_full:
            self._written_full = server.memory()["disk"]["written_bytes"]
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, self._limits)

    def check_freed(self, report: dict[str, Any]) -> None:
        """Whether something was written since the disk had room again."""
        if self.was_full and report["disk"]["written_bytes"] <= self._written_full:
            self.traffic.fail("nothing is written since the disk has room again")

    def __str__(self) -> str:
        return (
            f"at most {self.held_peak / 1e6:.1f} MB held and {self.disk_peak / 1e6:.1f} MB on "
            f"disk in {self.n_polls} looks"
        )


def alone(server: Server, answers: Sequence[tuple[tuple[str, str], str]]) -> Iterator[str]:
    """What a server that keeps no prompts, and is asked nothing else, answers otherwise."""
    for (path, body), text in answers:
        request = json.loads(body)
        reply = exchange(server.port, path, request)
        if reply.n_cached:
            yield f"{reply.n_cached} tokens of a request were cached where nothing is kept"
        if reply.text != text and not (path == TEXT and is_tie(server, request, text)):
            yield f"a request to {path} was answered {text!r}, and alone {reply.text!r}: {body}"


def is_tie(server: Server, request: dict[str, Any], text: str) -> bool:
    """Whether a text is another one than a lone request's by a choice that was none.

    A text that goes on as it likes comes to words that are as likely as each other; rounding picks.
    """
    wanted = {**request, "stream": False, "logprobs": True, "top_logprobs": 5}
    status, reply = server.request(TEXT, wanted)
    assert status == 200, reply
    rest = text.replace(" ", "")
    for entry in reply["choices"][0]["logprobs"]["content"]:
        token = entry["token"].strip()
        if not rest.startswith(token):
            others = (x for x in entry["top_logprobs"] if rest.startswith(x["token"].strip()))
            return any(entry["logprob"] - x["logprob"] < TIE for x in others)
        rest = rest[len(token) :]
    return False
