"""Try sequences of everything that can be done to a cache, until one fails or time is up.

``python -m scripts.try_everything --minutes 30``; from the project's root, where ``tests`` lie.
Every sequence is compared with an exact twin after each step. Exit code 1, and the sequence that
failed, at the first failure.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter

from tests.cache.machine import MLXCache, TorchCache
from tests.machines import run
from tests.mlx_metal.model_machine import ModelMachine
from tests.torch_cuda.machine import TransformersCache

MACHINES = {
    "cache-mlx": MLXCache,
    "cache-torch": TorchCache,
    "model-mlx": ModelMachine,
    "model-torch": TransformersCache,
}
AT_ONCE = 10
"""Sequences of one machine before the next one's turn."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    parser.add_argument("--steps", type=int, default=20, help="rules of a sequence (default: 20)")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    return parser


def main() -> None:
    """Run all machines in turn."""
    args = setup_arg_parser().parse_args()
    logging.disable(logging.WARNING)
    end, passed = time.monotonic() + 60 * args.minutes, Counter[str]()
    while time.monotonic() < end:
        for name in args.machines:
            try:
                run(MACHINES[name], AT_ONCE, args.steps, is_repeatable=False)
            except Exception:
                traceback.print_exc()
                print(f"\n{name} failed after {dict(passed)} sequences that passed")
                sys.exit(1)
            passed[name] += AT_ONCE
            print(f"passed: {dict(passed)}", flush=True)


if __name__ == "__main__":
    main()
