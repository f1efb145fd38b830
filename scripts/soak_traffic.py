"""What the clients of :mod:`scripts.soak_server` share, and what came of their requests."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scripts.soak_requests import Chat, Reply
from tests.serving import Server

GRACE_S = 2.0
"""Before SIGTERM: what was sent earlier has been read, and is answered."""


class OverError(Exception):
    """There is no server to be asked, and there will be none."""


class Traffic:
    """What all clients share: the server that is up, and what came of the requests."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._server: Server | None = None
        self._is_paused = False
        self._n_busy = 0
        self._ends: dict[Server, float] = {}
        """When servers were told to end."""
        self.is_over = False
        self.statuses: Counter[str] = Counter()
        self.actions: Counter[str] = Counter()
        self.failures: list[str] = []
        self.answers: dict[tuple[str, str], str] = {}
        """Texts of whole answers by path and body."""
        self.chats: list[Chat] = []
        """Beginnings of conversations that others may go on with."""
        self.n_prompt = self.n_cached = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thing that a client does; none begins while the traffic is paused."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_paused)
            self._n_busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_busy -= 1
                self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A time in which no client does anything."""
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: not self._n_busy)
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def open(self, server: Server | None) -> None:
        """Let clients ask this server; None lets them wait for the next."""
        with self._changed:
            self._server = server
            self._changed.notify_all()

    def end(self, server: Server) -> None:
        """Note that a server is told to end now."""
        with self._changed:
            self._ends[server] = time.monotonic()

    def server(self) -> Server:
        """The one to be asked, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._server is not None or self.is_over)
            if self._server is None:
                raise OverError
            return self._server

    def stop(self) -> None:
        """Let clients do no more."""
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def fail(self, text: str) -> None:
        with self._changed:
            self.failures.append(text)

    def count(self, action: str, status: str, reply: Reply | None = None) -> None:
        with self._changed:
            self.actions[action] += 1
            self.statuses[status] += 1
            if reply is not None:
                self.n_prompt += reply.n_prompt
                self.n_cached += reply.n_cached

    def keep(self, path: str, body: dict[str, Any], text: str) -> None:
        """A whole answer, which must be that of the same request before."""
        plain = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
        with self._changed:
            before = self.answers.setdefault((path, json.dumps(plain)), text)
        if before != text:
            self.fail(f"a request to {path} is answered {text!r}, and before {before!r}")

    def share(self, chat: Chat) -> None:
        with self._changed:
            self.chats = [*self.chats[-20:], copy.deepcopy(chat)]

    def is_lost(self, sent_at: float, server: Server) -> bool:
        """Whether a request without an answer should have one: the server was not ending."""
        return sent_at < self._ends.get(server, float("inf")) - GRACE_S
