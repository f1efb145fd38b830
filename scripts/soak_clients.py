"""The clients of :mod:`scripts.soak_server`."""

from __future__ import annotations

import copy
import json
import time
from contextlib import suppress
from http.client import HTTPException
from random import Random
from typing import Any
from urllib.request import urlopen

from scripts.fuzz_messages import COUNT, MESSAGE, message_kinds
from scripts.fuzz_requests import TEXT, Kind, kinds
from scripts.fuzz_server import send
from scripts.soak_requests import NO_END, BrokenOffError, Chat, Reply, Writer, body_of, exchange
from scripts.soak_traffic import OverError, Traffic
from tests.serving import CHAT, LAST_RESORT_S, Server

ACTIONS = {
    "begin": 3,
    "ask": 8,
    "call": 3,
    "edit": 2,
    "branch": 3,
    "rewrite": 1,
    "repeat": 2,
    "leave-prefill": 1,
    "leave-answer": 1,
    "count": 1,
    "look": 1,
    "malformed": 4,
}
"""What a client does next, and how often."""
MOST_TOKENS = 1800
"""Of a conversation, after which another begins."""
TIMEOUT_S = 60
"""The server's for a request, of whose silent ones none are sent."""
MALFORMED = [kind for kind in (*kinds(TIMEOUT_S), *message_kinds()) if "silence" not in kind.name]


class Client:
    """One client, which does one thing after the other.

    Args:
        traffic: Shared by all.
        seed: Of what it does.
        scale: Of the lengths of all texts.
    """

    def __init__(self, traffic: Traffic, seed: int, scale: float) -> None:
        self.traffic = traffic
        self.random = Random(seed)
        self.writer = Writer(self.random, scale)
        self.chat: Chat = []
        self.path, self.has_tools = CHAT, False
        self.last: tuple[str, dict[str, Any]] | None = None
        self.n_tokens = 0

    def run(self) -> None:
        """Go on until the traffic is over."""
        while not self.traffic.is_over:
            with suppress(OverError), self.traffic.turn():
                if not self.traffic.is_over:
                    self.step()

    def step(self) -> None:
        (action,) = self.random.choices(list(ACTIONS), list(ACTIONS.values()))
        if not self.chat or self.n_tokens > MOST_TOKENS * self.writer.scale:
            action = "begin"
        if action == "malformed":
            self.malform()
        elif action == "look":
            self.look()
        elif action == "repeat" and self.last is not None:
            self.ask(action, *self.last)
        elif action.startswith("leave"):
            self.leave(action)
        elif action == "count":
            turns = [*self.chat, self.writer.question(20)]
            body = body_of(MESSAGE, turns, self.has_tools, model="default_model")
            self.ask(action, COUNT, body)
        else:
            self.go_on(action)

    def go_on(self, action: str) -> None:
        """Take a conversation further by a question and its answer."""
        if action == "begin":
            self.path = self.random.choice((CHAT, CHAT, MESSAGE, MESSAGE, TEXT))
            self.has_tools = self.random.random() < 0.5
            self.chat = [self.writer.system()]
        elif action == "branch" and self.traffic.chats:
            chat = self.random.choice(self.traffic.chats)
            turns = [i + 1 for i, x in enumerate(chat) if x["role"] == "assistant" and x["content"]]
            self.chat = copy.deepcopy(chat[: self.random.choice(turns)])
        elif action == "edit":
            while self.chat and self.chat.pop()["role"] != "user":
                pass
        elif action == "rewrite":
            summary = {"role": "system", "content": self.writer.text(60)}
            self.chat = [self.chat[0], summary]
        elif action == "call":
            self.chat += self.writer.tool_turn()
        self.chat.append(self.writer.question(self.random.choice((20, 60, 200))))
        options: dict[str, Any] = {"max_tokens": self.random.choice((4, 12, 40))}
        if self.random.random() < 0.5:
            options["stream"] = True
            if self.path != MESSAGE:
                options["stream_options"] = {"include_usage": True}
        body = body_of(self.path, copy.deepcopy(self.chat), self.has_tools, **options)
        self.last = self.path, body
        reply = self.ask(action, self.path, body)
        if reply is None:
            self.chat = []
            return
        self.n_tokens = reply.n_prompt
        self.chat.append({"role": "assistant", "content": reply.text})
        if reply.text:
            self.traffic.share(self.chat)

    def ask(self, action: str, path: str, body: dict[str, Any]) -> Reply | None:
        """Send a request until a server answers; None if it does not as it should."""
        while True:
            server, sent_at = self.traffic.server(), time.monotonic()
            try:
                reply = exchange(server.port, path, body)
            except BrokenOffError as error:
                self.traffic.count(action, "broken off")
                self.traffic.fail(f"{action}: an answer broke off: {error}")
                return None
            except OSError as error:
                if self.lost(action, sent_at, server, f"no answer: {error!r}"):
                    return None
                continue
            self.traffic.count(action, str(reply.status), reply)
            if reply.status == 503:
                time.sleep(1)
            elif reply.status != 200:
                self.traffic.fail(f"{action}: {path} is answered {reply.status}: {reply.text}")
                return None
            else:
                self.traffic.keep(path, body, reply.text)
                return reply

    def lost(self, action: str, sent_at: float, server: Server, text: str) -> bool:
        """Note a request that got nothing; whether it should have."""
        is_lost = self.traffic.is_lost(sent_at, server)
        self.traffic.count(action, "lost" if is_lost else "refused at the end")
        if is_lost:
            self.traffic.fail(f"{action}: {text}")
        else:
            time.sleep(0.2)
        return is_lost

    def leave(self, action: str) -> None:
        """Close the connection in the prefill or in the answer."""
        chat = [*self.chat, self.writer.question(400)]
        options = {"stream": True, "max_tokens": 300, "logit_bias": NO_END}
        body = json.dumps(body_of(CHAT, chat, self.has_tools, **options)).encode()
        mark = b"data:" if action == "leave-answer" else b"keepalive"
        server, sent_at = self.traffic.server(), time.monotonic()
        try:
            connection = server.post(body)
            with connection, connection.makefile("rb") as lines:
                first = lines.readline()
                found = next((line for line in lines if mark in line), None)
        except OSError as error:
            self.lost(action, sent_at, server, repr(error))
            return
        if not first:
            self.lost(action, sent_at, server, "closed without an answer")
            return
        self.traffic.count(action, "left")
        if b" 200 " not in first or found is None:
            self.traffic.fail(f"{action}: {first!r}, and no line with {mark!r}")

    def malform(self) -> None:
        kind: Kind = self.random.choice(MALFORMED)
        server, sent_at = self.traffic.server(), time.monotonic()
        outcome = send(server, kind)
        if outcome.failure is None:
            self.traffic.count("malformed", outcome.status)
        elif outcome.status in ("reset", "closed"):
            self.lost("malformed", sent_at, server, f"{kind.name}: {outcome.failure}")
        else:
            self.traffic.count("malformed", outcome.status)
            self.traffic.fail(f"malformed, {kind.name}: {outcome.failure}")

    def look(self) -> None:
        """Open the page for people."""
        server, sent_at = self.traffic.server(), time.monotonic()
        try:
            with urlopen(f"http://127.0.0.1:{server.port}/xkv", timeout=LAST_RESORT_S) as answer:
                text = answer.read()
        except (OSError, HTTPException) as error:
            self.lost("look", sent_at, server, repr(error))
            return
        self.traffic.count("look", str(answer.status))
        if b"</html>" not in text:
            self.traffic.fail(f"look: {text[-300:]!r}")
