"""How the server ends."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest

from tests.serving import LAST_RESORT_S, MESSAGES, Server

LONG = {"messages": MESSAGES, "max_tokens": 400, "logit_bias": {"2": -100}, "stream": True}


@pytest.mark.parametrize("second", [None, signal.SIGTERM, signal.SIGINT])
def test_answers_are_completed_at_the_first_signal(second: signal.Signals | None) -> None:
    with Server() as server:
        idle = socket.create_connection(("127.0.0.1", server.port), LAST_RESORT_S)
        connection = server.post(json.dumps(LONG).encode())
        with idle, connection, connection.makefile("rb") as lines:
            next(line for line in lines if line.startswith(b"data:"))
            server.process.send_signal(signal.SIGTERM)
            next(line for line in lines if line.startswith(b"data:"))
            while second is None:
                try:
                    server.memory()
                    time.sleep(0.05)
                except ConnectionRefusedError:
                    assert server.process.poll() is None
                    break
                except ConnectionError:
                    continue
            if second is not None:
                server.process.send_signal(second)
            rest = lines.read()
        code = server.process.wait()
    if second is None:
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason": "length"' in rest
        assert code == 0
    else:
        assert b"[DONE]" not in rest
        assert code == 128 + second
