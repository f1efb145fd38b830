"""Agent-like traffic against ``python -m xkv.server``, and whether all that must hold held.

    python -m scripts.serve_traffic --minutes 10
    python -m scripts.serve_traffic --minutes 10 --model DIR --compression 4

Flags that are not listed below go to the server; without any, the bundled model runs in float32 at
full rank, where an answer from a reused cache equals that of a fresh one. Exit code 1 if the server
answered with a 5xx, logged a traceback, kept more than it may or gave another answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.serving import CHAT, Server, float32_model
from xkv.tiny import make_document

EXACT = ["--rank-k", "full", "--rank-v", "full", "--group-size", "4"]
SLACK_BYTES = 8_000_000
"""For what is neither weights nor a cached prompt: constants, what Python has not collected yet."""


class Step(NamedTuple):
    """One request of the mix.

    ``begin`` a chat with a system prompt of that many tokens; ``ask``; answer a ``call`` of a tool
    with that many tokens; the same after a ``malformed`` call; ``edit`` the last question;
    ``rewrite`` the history into a summary; ``branch`` off the middle of another chat; ``leave`` in
    the prefill or in the answer; four ``at-once``.
    """

    chat: str
    action: str
    n_tokens: int
    other: str = ""


MIX = (
    Step("coder", "begin", 2600),
    Step("coder", "ask", 60),
    Step("coder", "call", 400),
    Step("coder", "ask", 20),
    Step("coder", "malformed", 60),
    Step("coder", "ask", 20),
    Step("coder", "edit", 60),
    Step("reviewer", "branch", 60, "coder"),
    Step("reviewer", "call", 800),
    Step("coder", "ask", 20),
    Step("visitor", "begin", 60),
    Step("visitor", "leave-prefill", 1500),
    Step("visitor", "ask", 20),
    Step("reviewer", "leave-answer", 60),
    Step("reviewer", "ask", 20),
    Step("all", "at-once", 120),
    Step("coder", "rewrite", 300),
    Step("coder", "call", 200),
    Step("planner", "branch", 30, "reviewer"),
    Step("planner", "edit", 200),
    Step("planner", "malformed", 100),
    Step("all", "at-once", 30),
    Step("planner", "rewrite", 100),
    Step("coder", "leave-prefill", 900),
    Step("coder", "edit", 20),
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("read_file", "write_file", "run")
]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="the mix is replayed until then")
    parser.add_argument("--scale", type=float, default=1, help="of the lengths of all texts")
    parser.add_argument("--samples", type=int, default=12, help="answers to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-cache-bytes", type=int, default=300_000_000)
    return parser


class Traffic:
    """The chats of one round of the mix, and what came of all requests."""

    def __init__(self, server: Server, scale: float, seed: int) -> None:
        self.server = server
        self.scale = scale
        self.random = Random(seed)
        self.chats: dict[str, list[dict[str, Any]]] = {}
        self.statuses: Counter[str] = Counter()
        self.reused: list[tuple[dict[str, Any], str]] = []
        """Requests that a cached prompt was used for, and their answers."""
        self.n_tokens = self.n_cached = 0

    def take(self, step: Step) -> None:
        """Send what a step says, and keep the answer in its chat."""
        if step.action == "at-once":
            for chat in self.chats.values():
                chat.append(self.question(step.n_tokens))
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self.send, self.chats.values()))
            return
        chat = self.chats.setdefault(step.chat, [])
        if step.action == "branch":
            other = self.chats[step.other]
            # every message but the system's has an answer
            chat[:] = [dict(x) for x in other[: 1 + len(other) // 4 * 2]]
        elif step.action in ("begin", "rewrite"):
            kept = {"role": "system", "content": self.text(step.n_tokens)}
            chat[:] = [kept] if step.action == "begin" else [chat[0], kept]
        elif step.action == "edit":
            while chat.pop()["role"] != "user":
                pass
        elif step.action in ("call", "malformed"):
            chat.extend(self.tool_call(step))
        chat.append(self.question(20 if step.action in ("begin", "rewrite") else step.n_tokens))
        if step.action.startswith("leave"):
            self.leave(chat, step.action)
            chat.pop()
        else:
            self.send(chat)

    def text(self, n_tokens: int) -> str:
        return make_document(self.random.randrange(10**6), self.scaled(n_tokens)).text

    def scaled(self, n_tokens: int) -> int:
        return max(round(n_tokens * self.scale), 12)

    def question(self, n_tokens: int) -> dict[str, Any]:
        document = make_document(self.random.randrange(10**6), self.scaled(n_tokens), 1)
        return {"role": "user", "content": f"{document.text} {document.facts[0].question}"}

    def tool_call(self, step: Step) -> list[dict[str, Any]]:
        arguments = '{"path": "notes' if step.action == "malformed" else '{"path": "notes"}'
        function = {"name": "read_file", "arguments": arguments}
        call = {"id": "1", "type": "function", "function": function}
        result = "invalid arguments" if step.action == "malformed" else self.text(step.n_tokens)
        return [
            self.question(20),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": result},
        ]

    def body(self, chat: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        return {
            "messages": chat,
            "tools": TOOLS,
            "max_tokens": 12,
            "temperature": 0,
            "user": None,
            **options,
        }

    def send(self, chat: list[dict[str, Any]]) -> None:
        body = self.body([dict(message) for message in chat])
        status, answer = self.server.request(CHAT, body)
        self.statuses[str(status)] += 1
        if status != 200:
            print(status, answer, file=sys.stderr)
            chat.append({"role": "assistant", "content": ""})
            return
        text = answer["choices"][0]["message"]["content"] or ""
        usage = answer["usage"]
        n_cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.n_tokens += usage["prompt_tokens"]
        self.n_cached += n_cached
        if n_cached:
            self.reused.append((body, text))
        chat.append({"role": "assistant", "content": text})

    def leave(self, chat: list[dict[str, Any]], action: str) -> None:
        """Send a request and close the connection before it is answered."""
        body = self.body(chat, stream=True, max_tokens=300, logit_bias={"2": -100})
        connection = self.server.post(json.dumps(body).encode())
        with connection, connection.makefile("rb") as lines:
            if action == "leave-answer":
                next((line for line in lines if line.startswith(b"data:")), None)
            else:
                next((line for line in lines if b"keepalive" in line), None)
        self.statuses[action] += 1


def compared(server: Server, sample: list[tuple[dict[str, Any], str]]) -> list[str]:
    """What a server that keeps no prompts answers otherwise."""
    wrong = []
    for body, text in sample:
        _, answer = server.request(CHAT, body)
        fresh = answer["choices"][0]["message"]["content"] or ""
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        if fresh != text:
            wrong.append(f"answer {text!r} from a reused cache, {fresh!r} from a fresh one")
    return wrong


def failures_of(traffic: Traffic, limit_bytes: int, log: str) -> list[str]:
    """What must hold once the server is idle, and does not."""
    failures = [f"{n} answers with status {x}" for x, n in traffic.statuses.items() if x[0] in "45"]
    if "Traceback (most recent call last)" in log:
        failures.append(f"a traceback in the log: {log[log.index('Traceback') :][:2000]}")
    report = traffic.server.settled_memory()
    held, active = report["held_bytes"], report["active_memory_bytes"]
    extra = active - report["model_bytes"] - held
    print(
        f"Idle: {report['sequences']} prompts in {held / 1e6:.1f} MB of {limit_bytes / 1e6:.1f}, "
        f"{extra / 1e6:.1f} MB besides them and the weights"
    )
    if held > limit_bytes:
        failures.append(f"cached prompts take {held} bytes, and {limit_bytes} are allowed")
    if extra > SLACK_BYTES:
        failures.append(f"{extra} bytes are neither weights nor cached prompts")
    return failures


def main() -> None:
    args, flags = setup_arg_parser().parse_known_args()
    is_exact = not flags or "--rank-k full --rank-v full" in " ".join(flags)
    flags = flags or EXACT
    with tempfile.TemporaryDirectory() as folder:
        if "--model" not in flags:
            flags = [*flags, "--model", str(float32_model(Path(folder) / "model"))]
        failures = replay(args, flags, is_exact, Path(folder) / "log")
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if failures else 0)


def replay(args: argparse.Namespace, flags: list[str], is_exact: bool, log: Path) -> list[str]:
    """Replay the mix until the time is over; returns what did not hold."""
    limit = ["--prompt-cache-bytes", str(args.prompt_cache_bytes)]
    deadline = time.monotonic() + 60 * args.minutes
    n_rounds = 0
    with log.open("wb") as file, Server(*flags, *limit, log=file) as server:
        traffic = Traffic(server, args.scale, args.seed)
        while not n_rounds or time.monotonic() < deadline:
            for step in MIX:
                traffic.take(step)
            traffic.chats.clear()
            n_rounds += 1
        failures = failures_of(traffic, args.prompt_cache_bytes, log.read_text())
        if server.process.poll() is not None:
            failures.append(f"the server ended with code {server.process.returncode}")
    done = ", ".join(f"{name}: {n}" for name, n in sorted(traffic.statuses.items()))
    share = traffic.n_cached / max(traffic.n_tokens, 1)
    print(f"{n_rounds} rounds ({done}), {share:.0%} of {traffic.n_tokens} prompt tokens reused")
    if is_exact:
        n_samples = min(args.samples, len(traffic.reused))
        sample = traffic.random.sample(traffic.reused, n_samples)
        with log.open("ab") as file, Server(*flags, "--prompt-cache-size", "0", log=file) as fresh:
            wrong = compared(fresh, sample)
        print(f"{n_samples - len(wrong)} of {n_samples} answers equal those of a fresh cache")
        failures += wrong
    return failures


if __name__ == "__main__":
    main()
