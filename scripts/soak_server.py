"""Hours of agents in minutes against ``python -m xkv.server``, and whether all that must hold held.

    python -m scripts.soak_server --minutes 10 --clients 8
    python -m scripts.soak_server --minutes 10 --model DIR --compression 4

Clients have conversations on all paths, leave, and send malformed requests; the disk is full for a
while, and near the end the server is told to end in the middle of answers and is started again.
Flags that are not listed below go to the server; without any, the bundled model runs in float32 at
full rank, where each whole answer must be that of the same request to a server that is asked
nothing else. Exit code 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import IO

from scripts.soak_checks import Idle, Watch, alone, idle_failures, log_failures
from scripts.soak_clients import TIMEOUT_S, Client
from scripts.soak_traffic import Traffic
from tests.serving import Server, float32_model

EXACT = ["--rank-k", "full", "--rank-v", "full", "--group-size", "4"]
CALM_SHARES = 0.3, 0.6, 0.85
"""Of the time, after which clients pause and the idle server is looked at."""
FULL_SHARES = 0.35, 0.5
"""From when to when the disk is full."""
MOST_SHOWN = 20
"""Failures."""


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of traffic, at least")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1, help="of the lengths of all texts")
    parser.add_argument("--samples", type=int, help="answers to compare; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt-cache-bytes", type=int, default=60_000_000)
    parser.add_argument("--prompt-cache-disk-bytes", type=int, default=80_000_000)
    return parser


class Soak:
    """One run.

    Args:
        args: The command's flags.
        flags: The server's.
        folder: For its conversations.
        log: Where it writes; no file, as the disk is full for it.
    """

    def __init__(
        self, args: argparse.Namespace, flags: list[str], folder: Path, log: IO[bytes]
    ) -> None:
        self.args, self.log = args, log
        limits = {
            "--prompt-cache-bytes": args.prompt_cache_bytes,
            "--prompt-cache-dir": folder,
            "--prompt-cache-disk-bytes": args.prompt_cache_disk_bytes,
            "--decode-concurrency": 4,
            "--max-tokens": 16,
            "--max-body-bytes": 2_000_000,
            "--request-timeout": TIMEOUT_S,
        }
        self.flags = [str(x) for pair in limits.items() for x in pair] + flags
        self.traffic = Traffic()
        self.watch = Watch(self.traffic, folder, args.prompt_cache_disk_bytes)
        self.idle: list[Idle] = []

    def run(self) -> None:
        """All of it; what did not hold is in ``traffic.failures``."""
        args = self.args
        clients = [Client(self.traffic, args.seed + i, args.scale) for i in range(args.clients)]
        with ThreadPoolExecutor(args.clients + 1) as pool:
            tasks = [pool.submit(x.run) for x in clients] + [pool.submit(self.watch.run)]
            try:
                with Server(*self.flags, log=self.log) as server:
                    self._until_end(server)
                with Server(*self.flags, log=self.log) as server:
                    self._after_restart(server)
            finally:
                self.traffic.stop()
        for task in tasks:
            task.result()

    def _until_end(self, server: Server) -> None:
        """All that happens to the first server."""
        traffic, before = self.traffic, 0.0
        traffic.open(server)
        for share in sorted((*CALM_SHARES, *FULL_SHARES)):
            self._let_go_on(server, share - before)
            before = share
            if share in CALM_SHARES:
                with traffic.paused():
                    self._look(server)
            elif share == FULL_SHARES[0]:
                self.watch.fill_disk(server)
            else:
                self.watch.free_disk(server)
        self.watch.check_freed(self.idle[-1].report)
        for failure in idle_failures(*self.idle[-2:]):
            traffic.fail(failure)
        while server.memory()["requests"]["running"] < min(2, self.args.clients):
            time.sleep(0.01)
        traffic.end(server)
        server.process.send_signal(signal.SIGTERM)
        traffic.open(None)
        code = server.process.wait()
        if code != 0:
            traffic.fail(f"the server ended with code {code} at SIGTERM")

    def _after_restart(self, server: Server) -> None:
        """Conversations go on with another server in the same folder."""
        traffic = self.traffic
        traffic.open(server)
        self._let_go_on(server, 1 - CALM_SHARES[-1])
        with traffic.paused():
            self._look(server)
            traffic.stop()
        report = self.idle[-1].report
        print(
            f"After the restart: {report['disk']['hits']} conversations from disk, "
            f"{report['requests']['cached_tokens']} of {report['requests']['prompt_tokens']} "
            "prompt tokens reused"
        )
        if not report["disk"]["hits"]:
            traffic.fail("no conversation went on from disk after the restart")

    def _let_go_on(self, server: Server, share: float) -> None:
        """Wait for a share of the time, and for as many answers as there are clients."""
        until = time.monotonic() + share * 60 * self.args.minutes
        n_wanted = self.args.clients + server.memory()["requests"]["answered"]
        while time.monotonic() < until or server.memory()["requests"]["answered"] < n_wanted:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {server.process.returncode}")
            time.sleep(0.2)

    def _look(self, server: Server) -> None:
        """Look at the server, which nobody asks anything."""
        self.idle.append(Idle.of(server))
        print(self.idle[-1], flush=True)

    def summary(self) -> str:
        """The last line."""
        traffic = self.traffic
        actions, statuses = (
            ", ".join(f"{name}: {n}" for name, n in sorted(x.items()))
            for x in (traffic.actions, traffic.statuses)
        )
        return (
            f"{sum(traffic.actions.values())} requests ({actions}) answered ({statuses}), "
            f"{traffic.n_cached / max(traffic.n_prompt, 1):.0%} of {traffic.n_prompt} prompt "
            f"tokens reused; {self.watch}, {self.idle[-1].held_bytes / 1e6:.1f} MB at the end"
        )


@contextmanager
def log_pipe(path: Path) -> Iterator[IO[bytes]]:
    """What is written into it is in the file at the end of the block."""
    ours, theirs = os.pipe()
    with path.open("wb") as file, os.fdopen(ours, "rb", buffering=0) as source:
        copying = threading.Thread(target=shutil.copyfileobj, args=(source, file))
        copying.start()
        try:
            with os.fdopen(theirs, "wb") as end:
                yield end
        finally:
            copying.join()


def compare(args: argparse.Namespace, flags: list[str], traffic: Traffic, log: IO[bytes]) -> None:
    """Ask a server for each answer by itself."""
    answers = list(traffic.answers.items())
    if args.samples is not None:
        answers = Random(args.seed).sample(answers, min(args.samples, len(answers)))
    with Server(*flags, "--prompt-cache-size", "0", log=log) as server:
        wrong = list(alone(server, answers))
    print(f"{len(answers) - len(wrong)} of {len(answers)} answers equal those of a lone request")
    traffic.failures += wrong


def main() -> None:
    args, flags = setup_arg_parser().parse_known_args()
    is_exact = not flags or "--rank-k full --rank-v full" in " ".join(flags)
    flags = flags or EXACT
    # on a CPU MLX compiles what it fuses by files of a compiler's, which a full disk would end
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "--model" not in flags:
            flags = [*flags, "--model", str(float32_model(folder / "model"))]
        with log_pipe(folder / "log") as log:
            soak = Soak(args, flags, folder / "conversations", log)
            traffic = soak.traffic
            try:
                soak.run()
                if is_exact:
                    compare(args, flags, traffic, log)
            except (RuntimeError, ConnectionError) as error:
                traffic.fail(str(error))
        text = (folder / "log").read_text(errors="replace")
    traffic.failures += log_failures(text, soak.watch.was_full)
    print(soak.summary())
    for failure in traffic.failures[:MOST_SHOWN]:
        print(f"FAILED: {failure}")
    sys.exit(1 if traffic.failures else 0)


if __name__ == "__main__":
    main()
