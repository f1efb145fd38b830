"""``python -m xkv.doctor``: what works on this machine, and how fast."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from xkv.checks.machine import examine, report_rows
from xkv.cli.record import Record, make_record, record_text, typed_command
from xkv.errors import InputError

SHORTEST = 256
"""Tokens of which a decode step is timed, at least."""


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xkv.doctor",
        description="Check the kernels of this machine against their plain twins and time decode "
        "attention in the shapes of an 8B model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backend", choices=["mlx", "torch"], default="mlx", help="framework")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="begin no length that would take longer"
    )
    parser.add_argument(
        "--json", action="store_true", help="a record: one JSON object, for bug reports"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the report; exit code 1 if a kernel of this device fails or disagrees."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    say = (lambda *_: None) if args.json else print
    logger = logging.getLogger("xkv")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the report says itself why a kernel does not run
    try:
        if min(args.lengths) < SHORTEST:
            raise InputError(f"--lengths {min(args.lengths)} must be at least {SHORTEST}")
        report = examine(args.backend, args.lengths, args.max_seconds, say)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        logger.setLevel(level)
    if args.json:
        print(record_text(_record(report, typed_command(parser.prog, argv))), end="")
    if any(kernel["status"] == "failed" for kernel in report["kernels"]):
        sys.exit(1)


def _record(report: dict[str, Any], command: str) -> Record:
    estimate = report["estimate"]
    settings = {
        "device": report["device"],
        "bytes_per_second": estimate["bandwidth"],
        "products_per_second": estimate["products"],
        "verdict": report["verdict"],
    }
    return make_record(
        "doctor",
        report_rows(report),
        command=command,
        model="layers of Llama-3.1-8B's shape",
        backend=report["backend"],
        settings=settings,
    )


if __name__ == "__main__":
    main()
