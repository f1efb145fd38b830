"""Seconds of a newcomer's first commands, each a process of its own, one after another.

    python -m scripts.bench_first_run

The first command as it is and without OpenBLAS, the help, and the refusal of a bad flag.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from xkv.cli.openblas import OPT_OUT
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors

GENERATE = "-m", "xkv.generate"


class Case(NamedTuple):
    """A command line, whether it may load OpenBLAS, its exit code, and the most runs of it."""

    arguments: tuple[str, ...]
    is_openblas_allowed: bool = True
    exit_code: int = 0
    most_runs: int | None = None

    @property
    def command(self) -> str:
        return " ".join(("python", *self.arguments))


CASES = (
    Case(GENERATE),
    Case(GENERATE, is_openblas_allowed=False, most_runs=1),
    Case((*GENERATE, "--help")),
    Case((*GENERATE, "--no-such-flag"), exit_code=2),
)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="of each command but the slow one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    return parser


def time_case(case: Case, run: int) -> dict[str, Any]:
    """Run a command once, as a row of a record."""
    kept = {
        name: value for name, value in os.environ.items() if name not in (OPT_OUT, "LD_PRELOAD")
    }
    environment = kept if case.is_openblas_allowed else {**kept, OPT_OUT: "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *case.arguments], env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    allowed = "if it is there" if case.is_openblas_allowed else f"no ({OPT_OUT}=1)"
    row = {"command": case.command, "openblas": allowed, "run": run}
    if done.returncode != case.exit_code:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return {**row, "problem": f"exit code {done.returncode}: {last}"}
    return {**row, "seconds": seconds}


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1")
    rows = []
    for case in CASES:
        for run in range(1, min(args.runs, case.most_runs or args.runs) + 1):
            rows.append(time_case(case, run))
            found = rows[-1].get("problem") or f"{rows[-1]['seconds']:.2f} s"
            print(f"{case.command}, OpenBLAS {rows[-1]['openblas']}: {found}", flush=True)
    if args.json:
        with user_errors():
            record = make_record(
                "first_run",
                rows,
                command=typed_command("python -m scripts.bench_first_run"),
                model="bundled",
                backend="mlx",
                settings={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset")},
            )
            write_record(args.json, record)
    if any("problem" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
