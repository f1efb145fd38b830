"""How the server takes clients in, and how it ends."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from xkv.backends.mlx_metal.server.errors import STATUS_PATH, RequestError
from xkv.backends.mlx_metal.server.guard import Timed, check_key, read_body, refusal
from xkv.backends.mlx_metal.server.traffic import Traffic

_OPEN_PATH = "/health"
"""Answered without a key."""
_LINGER_S = 1.0
"""For what a client still sends when it has been answered."""
_RETRY_S = 1


class GuardedRequests(BaseHTTPRequestHandler):
    """The part of a handler that takes a request in, before anything is made of it."""

    server: Any
    response_generator: Any

    def refuse(self, error: RequestError) -> None:
        """Answer why a request gets no other answer."""
        raise NotImplementedError

    def setup(self) -> None:
        super().setup()
        timed = Timed(self.connection, self.response_generator.cli_args.request_timeout)
        self.rfile: io.BufferedIOBase = io.BufferedReader(timed)
        # what is refused before it is read has none
        self.command = self.path = ""
        self.headers = HTTPMessage()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.end(self)

    def parse_request(self) -> bool:
        """Read the whole request; returns whether it may be answered."""
        if not super().parse_request():
            return False
        self.server.begin(self)
        args = self.response_generator.cli_args
        try:
            if self.command != "OPTIONS" and self.path != _OPEN_PATH:
                is_page = (self.command, self.path) == ("GET", STATUS_PATH)
                check_key(args.api_key, self.headers, is_page)
            if self.command == "POST":
                self.rfile = io.BytesIO(read_body(self.headers, self.rfile, args.max_body_bytes))
        except RequestError as error:
            self.refuse(error)
            return False
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server refuses by itself."""
        self.refuse(refusal(code, explain or message, self.command))

    def send_response_only(self, code: int, message: str | None = None) -> None:
        # http.server answers HTTP/0.9 without a status
        self.request_version = "HTTP/1.0"
        super().send_response_only(code, message)


class GuardedServer(ThreadingHTTPServer):
    """http.server's, with as many clients as it has places, which ends once it has answered."""

    request_queue_size = 128
    max_connections = 64
    at_end: Callable[[], None]
    """Called when everything is answered, before the process ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.traffic = Traffic()
        self._places = threading.Semaphore(self.max_connections)
        self._n_open = 0
        self._is_ending = False
        self._answering: set[Any] = set()
        self._changed = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            has_room = self._n_open < 2 * self.max_connections
            self._n_open += has_room
        if not has_room:
            # too many even to tell them
            self.close_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # no thread to be had
            self._leave()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._n_open -= 1

    def finish_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            request.sendall(_crowded(self.max_connections))
            return
        try:
            super().finish_request(request, client_address)
        finally:
            self._places.release()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection once the client has its answer: a reset would take that away."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + _LINGER_S
            while (left := deadline - time.monotonic()) > 0:
                request.settimeout(left)
                if not request.recv(1 << 16):
                    break
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            logging.info("the client is gone before its request was complete")
        else:
            logging.exception("a request cannot be handled")

    def begin(self, handler: Any) -> None:
        """A request whose headers are read, which is answered before the server ends."""
        with self._changed:
            self._answering.add(handler)

    def end(self, handler: Any) -> None:
        with self._changed:
            self._answering.discard(handler)
            self._changed.notify_all()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until SIGTERM, answer what was asked by then, and end the process."""
        with self._signals():
            super().serve_forever(poll_interval)
            self.server_close()
            with self._changed:
                self._changed.wait_for(lambda: not self._answering)
        if self._is_ending:
            self.at_end()
            # Python may abort where it stops clients' threads by itself
            os._exit(0)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def end(number: int, frame: Any) -> None:
            if number == signal.SIGINT or self._is_ending:
                logging.warning("ended at once")
                # neither for answers nor for the generation thread is waited
                os._exit(128 + number)
            self._is_ending = True
            logging.warning("answers are completed; a second signal ends the server at once")
            threading.Thread(target=self.shutdown).start()

        before = {x: signal.signal(x, end) for x in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _crowded(max_connections: int) -> bytes:
    """The answer for which there is no handler."""
    message = f"--max-connections {max_connections} clients are served at the moment: try again"
    body = json.dumps(RequestError(503, message).body).encode()
    head = (
        "HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: {_RETRY_S}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def server_class(most: int, at_end: Callable[[], None]) -> type[GuardedServer]:
    """A class of servers with this many places, which call ``at_end`` after the last answer."""
    return type(
        "Server", (GuardedServer,), {"max_connections": most, "at_end": staticmethod(at_end)}
    )


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a host's address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
