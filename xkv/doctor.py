"""``python -m xkv.doctor``: what works on this machine, and how fast."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from xkv.checks.machine import examine
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
    parser.add_argument("--json", action="store_true", help="one JSON object, for bug reports")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the report; exit code 1 if a kernel of this device fails or disagrees."""
    args = setup_arg_parser().parse_args(argv)
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
        print(json.dumps(report, indent=2))
    if any(kernel["status"] == "failed" for kernel in report["kernels"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
