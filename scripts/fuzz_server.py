"""Malformed requests against ``python -m xkv.server``, each of which must get a sentence.

    python -m scripts.fuzz_server --json fuzz.json
    python -m scripts.fuzz_server --kinds 50 --model DIR --compression 4

Flags that are not listed below go to the server, which is this script's own. Exit code 1 if it
answered with a 5xx other than 503, with an error that is no sentence or not at all, logged a
traceback, or gave a wrong answer to a plain request in between.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from scripts.fuzz_messages import message_kinds
from scripts.fuzz_requests import Kind, kinds
from tests.serving import ANSWER, CHAT, MESSAGES, Server

TIMEOUT_S = 4
"""In which the server wants a whole request."""
HANG_S = 300
"""Without an answer; the longest answer takes seconds."""
FLAGS = ["--max-tokens", "4", "--request-timeout", str(TIMEOUT_S), "--max-body-bytes", "2000000"]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kinds", type=int, help="as many, drawn at random; all if left out")
    parser.add_argument("--every", type=int, default=25, help="requests between two plain ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the summary there")
    return parser


class Outcome(NamedTuple):
    """What came of one request: a status, or "closed" where it got no answer."""

    status: str
    failure: str | None = None


def send(server: Server, kind: Kind) -> Outcome:
    """Send one request and judge its answer."""
    try:
        with socket.create_connection(("127.0.0.1", server.port), HANG_S) as connection:
            connection.sendall(kind.request)
            if kind.ends:
                connection.shutdown(socket.SHUT_WR)
            if kind.leaves:
                return Outcome("left")
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except TimeoutError:
        return Outcome("hang", f"no answer in {HANG_S} s")
    except ConnectionError as error:
        return Outcome("reset", str(error))
    return judged(kind, answer)


def judged(kind: Kind, answer: bytes) -> Outcome:
    """Whether an answer is one."""
    if not answer:
        return Outcome("closed", None if kind.may_close else "closed without an answer")
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if not head.startswith(b"HTTP/1.") or not words[1].isdigit():
        return Outcome("none", f"an answer without a status: {answer[:200]!r}")
    status = int(words[1])
    if status >= 500 and status != 503:
        return Outcome(str(status), f"status {status}: {body[:200]!r}")
    if status < 400:
        failure = f"an error after {status}: {body[:200]!r}" if b'"error"' in body else None
        return Outcome(str(status), failure)
    return Outcome(str(status), None if kind.has_no_body else no_sentence(body, kind.is_message))


def no_sentence(body: bytes, is_message: bool = False) -> str | None:
    """What is wrong with an error's body, if anything is; a message's is in Anthropic's form."""
    owner = "Anthropic's" if is_message else "OpenAI's"
    try:
        content = json.loads(body)
        message = content["error"]["message"]
        is_formed = (content.get("type") == "error") == is_message
    except (ValueError, KeyError, TypeError):
        is_formed = False
    if not is_formed:
        return f"an error that is not in {owner} form: {body[:200]!r}"
    return None if " " in message else f"an error that is no sentence: {message!r}"


def plain(server: Server) -> str | None:
    """What is wrong with the answer to a plain request, if anything is."""
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    status, answer = server.request(CHAT, body)
    text = answer["choices"][0]["message"]["content"] if status == 200 else answer
    return None if text == ANSWER else f"a plain request is answered {status}: {text!r}"


def sent(server: Server, chosen: list[Kind], every: int) -> Iterator[tuple[str, Outcome]]:
    """Send requests, and a plain one now and then; stops where the server does."""
    for i, kind in enumerate(chosen):
        outcome = send(server, kind)
        yield kind.name, outcome
        if outcome.status == "hang" or server.process.poll() is not None:
            # nothing would be waited for
            server.process.kill()
            return
        if i % every == every - 1 or i == len(chosen) - 1:
            failure = plain(server)
            yield "plain", Outcome("plain" if failure is None else "wrong", failure)


def fuzz(chosen: list[Kind], every: int, flags: list[str]) -> dict[str, Any]:
    """Run a server and send requests; returns the summary."""
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file, Server(*FLAGS, *flags, log=file) as server:
            for name, outcome in sent(server, chosen, every):
                statuses[outcome.status] += 1
                if outcome.failure is not None:
                    failures.append(f"{name}: {outcome.failure}")
        text = log.read_text(errors="replace")
    if server.process.returncode != 0:
        failures.append(f"the server ended with code {server.process.returncode}: {text[-1000:]}")
    if "Traceback (most recent call last)" in text:
        failures.append(f"a traceback in the log: {text[text.index('Traceback') :][:3000]}")
    return {
        "requests": sum(statuses.values()),
        "kinds": len(chosen),
        "statuses": dict(sorted(statuses.items())),
        "failures": failures,
    }


def main(argv: list[str] | None = None) -> None:
    args, flags = setup_arg_parser().parse_known_args(argv)
    chosen = [*kinds(TIMEOUT_S), *message_kinds()]
    if args.kinds is not None:
        chosen = Random(args.seed).sample(chosen, min(args.kinds, len(chosen)))
    summary = fuzz(chosen, args.every, flags)
    done = ", ".join(f"{status}: {n}" for status, n in summary["statuses"].items())
    print(f"{summary['requests']} requests of {summary['kinds']} kinds ({done})")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for failure in summary["failures"]:
        print(f"FAILED: {failure}")
    sys.exit(1 if summary["failures"] else 0)


if __name__ == "__main__":
    main()
