"""``python -m xkv.chat`` in a real terminal."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from xkv.tiny import make_document

DOCUMENT = make_document(seed=31, n_tokens=1500)
FLAGS = ["--compression", "3", "--group-size", "8", "--window", "64", "--prefill-step-size", "64"]
PROMPT = "\u203a"


class Terminal:
    """A program in a pseudo terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            # a job in the background ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        os.close(other)
        self.text = ""
        # a character may arrive in two pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._seen = 0

    def send(self, text: str) -> None:
        # in pieces: a terminal's input queue is short, and the program has to read on
        data = text.encode()
        while data:
            _, writable, _ = select.select([], [self.main], [], 600)
            assert writable
            data = data[os.write(self.main, data[:512]) :]
            self._read(0.02)

    def expect(self, pattern: str, seconds: float = 600) -> str:
        """Wait for something that was not there before; returns the text up to it."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.text[self._seen :])
            if found:
                before = self.text[self._seen :][: found.end()]
                self._seen += found.end()
                return before
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[self._seen :]!r}"
            self._read(0.2)

    def _read(self, seconds: float) -> None:
        if select.select([self.main], [], [], seconds)[0]:
            try:
                self.text += self._decoder.decode(os.read(self.main, 65536))
            except OSError:  # how Linux says that the program has ended
                time.sleep(seconds)

    def close(self) -> int:
        """Wait for the end; returns the exit code."""
        try:
            return self.process.wait(timeout=600)
        finally:
            self.process.kill()
            os.close(self.main)


@pytest.fixture
def chat():
    terminal = Terminal(sys.executable, "-m", "xkv.chat", *FLAGS, "--max-tokens", "12")
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()


def test_a_conversation_over_a_long_document(chat):
    first, second = DOCUMENT.facts[3], DOCUMENT.facts[-2]
    chat.expect("layer 0-7: compressed")
    chat.expect(PROMPT)
    chat.send(f"{DOCUMENT.text.replace(chr(10), ' ')} {first.question}\n")
    chat.expect(re.escape(first.answer))
    report = chat.expect(r"KV cache: \d+ tokens, .* held \(.* x\)")
    tokens, ratio = re.search(r"(\d+) tokens.*\((.*) x\)", report).groups()
    assert int(tokens) > 1500 and float(ratio) > 2.5
    chat.expect(PROMPT)
    chat.send(f"{second.question}\n")
    chat.expect(re.escape(second.answer))
    chat.expect(PROMPT)
    chat.send("r\n")
    chat.expect("reset|>> ")
    chat.send(f"{second.question}\n")
    forgotten = chat.expect(r"KV cache: \d+ tokens")
    assert second.answer not in forgotten
    assert int(forgotten.split()[-2]) < 100
    chat.expect(PROMPT)
    chat.send("q\n")
    assert chat.close() == 0


def test_ctrl_c_takes_back_one_message(chat):
    fact = DOCUMENT.facts[3]
    chat.expect(PROMPT)
    chat.send(f"{DOCUMENT.text.replace(chr(10), ' ')} {fact.question}\n")
    chat.expect(re.escape(fact.answer))
    before = int(chat.expect(r"KV cache: \d+ tokens").split()[-2])
    chat.expect(PROMPT)
    chat.send(f"{make_document(32, 1500).text.replace(chr(10), ' ')}\n")
    chat.expect(r"prefill: +\d+%")
    os.killpg(chat.process.pid, signal.SIGINT)
    chat.expect("interrupted: this message is forgotten")
    chat.expect(PROMPT)
    chat.send(f"{fact.question}\n")
    chat.expect(re.escape(fact.answer))
    after = int(chat.expect(r"KV cache: \d+ tokens").split()[-2])
    assert before < after < before + 40
    chat.expect(PROMPT)
    chat.send("\x04")
    assert chat.close() == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-kv-size", "100"], "--max-kv-size changes mlx-lm's own cache"),
        (["--compression", "0.5"], "compression=0.5 must be above 1"),
        (["--model", "/nowhere/model"], "neither a directory nor a repository"),
        (["--prefill-step-size", "4"], "must be above 16"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words):
    run = subprocess.run(
        [sys.executable, "-m", "xkv.chat", *flags],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
