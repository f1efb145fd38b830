"""``python -m xkv.plan``: the longest context that fits into memory, by kind of KV cache.

And what a decode step takes on named chips, by arithmetic. Only a model's ``config.json`` is read;
:mod:`xkv.planning.footprint` and :mod:`xkv.planning.decode_cost` have the formulas.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.planning.context import DEFAULT_CONTEXT, make_report, report_lines


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xkv.plan",
        description="Say how long a context fits into memory with mlx-lm's caches and with xKV's, "
        "and what decode takes on named chips, from a model's config.json alone.",
    )
    parser.add_argument(
        "--model",
        help="directory or Hugging Face repository, of which only config.json is downloaded; the "
        "bundled model if left out",
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="memory for weights, cache and workspace in GB of 1e9 bytes (default: what Metal "
        "recommends on this machine, else its physical memory)",
    )
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens at which sizes are given (default: {DEFAULT_CONTEXT}, or the trained context "
        "if that is less)",
    )
    parser.add_argument(
        "--compression",
        type=float,
        nargs="+",
        default=[4.0, 6.0, 8.0],
        help="ratios to show xKV at (default: 4 6 8)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=XKVConfig.group_size,
        help=f"layers that share a latent (default: {XKVConfig.group_size})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        report = make_report(args)
        print(json.dumps(report, indent=2) if args.json else "\n".join(report_lines(report)))


if __name__ == "__main__":
    main()
