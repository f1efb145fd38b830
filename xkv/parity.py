"""``python -m xkv.parity``: every operation and a short generation on both backends, compared."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from xkv.checks.parity import HEADER, compare_generation, compare_operations
from xkv.cli.terminal import user_errors
from xkv.errors import InputError
from xkv.ops.loading import load_backend
from xkv.tiny import CHECKPOINT_DIR


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xkv.parity",
        description="Compare every operation, and a short generation out of a compressed cache, on "
        "MLX and PyTorch with the reference. Exit code 1 if an error exceeds its tolerance.",
    )
    parser.add_argument("--model", help="directory or repository that mlx-lm and transformers load")
    parser.add_argument("--max-tokens", "-m", type=int, default=8, help="tokens to generate")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison line by line; exit code 1 on a miss."""
    args = setup_arg_parser().parse_args(argv)
    lines = []
    with user_errors():
        if args.max_tokens < 1:
            raise InputError(f"--max-tokens {args.max_tokens} must be at least 1")
        backends = [load_backend("mlx"), load_backend("torch")]
        for backend in backends:
            print(f"{backend.name} runs on {backend.device_name}")
        print(f"\n{HEADER}")
        for line in itertools.chain(
            compare_operations(backends),
            compare_generation(args.model or str(CHECKPOINT_DIR), args.max_tokens),
        ):
            print(line, flush=True)
            lines.append(line)
    n_misses = sum(line.is_miss for line in lines)
    if n_misses:
        print(f"\n{n_misses} of {len(lines)} errors exceed their tolerance")
        sys.exit(1)
    print(f"\nall {len(lines)} errors are within their tolerances")


if __name__ == "__main__":
    main()
