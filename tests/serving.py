"""A server in a process of its own, and a client for it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import openai

from xkv.tiny import CHECKPOINT_DIR

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Carl sold pointed ladders. What did Carl do?"}]
ANSWER = "Carl sold pointed ladders."
"""What the bundled model answers."""
LAST_RESORT_S = 600
"""Nothing takes that long on a machine that is only busy."""


def float32_model(path: Path) -> Path:
    """The bundled model in float32, which is several times faster on a CPU."""
    shutil.copytree(CHECKPOINT_DIR, path)
    (weights,) = path.glob("*.safetensors")
    wide = {name: x.astype(mx.float32) for name, x in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), wide, {"format": "mlx"})
    return path


class Server:
    """``python -m xkv.server`` until the end of a ``with`` block.

    Args:
        flags: Of the command.
        log: Where the process writes, if not where this one does.
    """

    def __init__(self, *flags: str, log: IO[bytes] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "xkv.server", *flags]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stderr=log)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=LAST_RESORT_S,
        )

    def __enter__(self) -> Server:
        while self.process.poll() is None:
            try:
                self.memory()
                return self
            except ConnectionRefusedError:
                time.sleep(0.2)
        raise RuntimeError(f"the server ended with code {self.process.returncode}")

    def __exit__(self, *raised: object) -> None:
        self.process.terminate()
        self.process.wait()

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the JSON of an answer; ``GET`` without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LAST_RESORT_S)
        try:
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def memory(self) -> dict[str, Any]:
        """What the server holds."""
        return self.request("/xkv/memory")[1]

    def settled_memory(self) -> dict[str, Any]:
        """The report once what clients have left is over."""
        while (report := self.memory())["reserved_bytes"] or report["requests"]["running"]:
            time.sleep(0.05)
        # by the thread that let go of it
        messages = [{"role": "user", "content": "a"}]
        self.request("/v1/messages/count_tokens", {"model": "default_model", "messages": messages})
        return self.memory()

    def ask(self, *texts: str, **options: Any) -> Any:
        """A chat: questions and answers in turn, the last a question."""
        roles = ("user", "assistant")
        messages: Any = [{"role": roles[i % 2], "content": x} for i, x in enumerate(texts)]
        return self.client.chat.completions.create(
            model="default_model", messages=messages, **{"max_tokens": 12, **options}
        )

    def post(self, body: bytes) -> socket.socket:
        """Send a request whose answer nobody has read."""
        connection = socket.create_connection(("127.0.0.1", self.port), LAST_RESORT_S)
        head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection


def chat(server: Server, **options: Any) -> Any:
    """The answer to :data:`MESSAGES`, which must be one."""
    body = {"messages": MESSAGES, "max_tokens": 12, **options}
    status, answer = server.request(CHAT, body)
    assert status == 200, answer
    return answer


def text_of(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"] or ""
