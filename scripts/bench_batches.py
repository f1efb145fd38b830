"""Several conversations in one batch of mlx-lm's, with the full cache and with compressed ones.

    python -m scripts.bench_batches --model M --sequences 4 --tokens 2048

Both sides in one process, in turn, through mlx-lm's own ``BatchGenerator``: prompts of a few
unequal lengths, then answers of a fixed length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator

import xkv
from xkv.backends.mlx_metal.cli.commands import Command
from xkv.backends.mlx_metal.model.calibration import calibrate_enabled
from xkv.backends.mlx_metal.model.enable import identity_of
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.planning.layer_groups import choose_profile
from xkv.tiny import CHECKPOINT_DIR, make_document

N_ANSWER = 48
APART = 37
"""Tokens by which each prompt is shorter than the one before it."""


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="a model for mlx-lm; the bundled one if left out")
    parser.add_argument("--tokens", type=int, default=2048, help="of the longest prompt")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    return parser


def time_batch(model: Any, prompts: list[list[int]]) -> dict[str, float]:
    """Answer all prompts: seconds in all, tokens a second of full steps, bytes at the end."""
    batches = BatchGenerator(model, max_tokens=N_ANSWER)
    batches.insert(prompts)
    began, steps, held = time.perf_counter(), [], 0
    while True:
        step = time.perf_counter()
        _, generated = batches.next()
        if len(generated) == len(prompts):
            steps.append(time.perf_counter() - step)
            if generated[0].finish_reason is None:
                held = batches.prompt_cache_nbytes
            else:
                break
    return {
        "seconds": time.perf_counter() - began,
        "decode_tps": len(prompts) / statistics.median(steps),
        "held_bytes": held,
    }


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if min(args.runs, args.sequences) < 1 or args.tokens <= args.sequences * APART:
        parser.error("--runs and --sequences must be at least 1, with some tokens for each")
    with user_errors():
        path, config = args.model or str(CHECKPOINT_DIR), XKVConfig(compression=args.compression)
        model, tokenizer, *_ = mlx_lm.load(path)
        Command().speed_up(model)
        profile = choose_profile(None, None, path, "mlx")
        if profile is not None:
            config = profile.apply(config, identity_of(model, config))
        xkv.enable(model, config)
        calibrate_enabled(model, tokenizer, config)
        xkv.disable(model)
        lengths = [args.tokens - APART * i for i in range(args.sequences)]
        texts = [make_document(i, 2 * args.tokens).text for i in range(args.sequences)]
        prompts = [tokenizer.encode(x)[:n] for x, n in zip(texts, lengths, strict=True)]
        rows = []
        for run in range(1, args.runs + 1):
            for method, ratio in (("full", None), ("xkv", args.compression)):
                if ratio is not None:
                    xkv.enable(model, config)
                measured = time_batch(model, prompts)
                if ratio is not None:
                    xkv.disable(model)
                rows.append(
                    {"sequences": len(prompts), "tokens": args.tokens, "method": method}
                    | {"ratio": ratio, "run": run}
                    | measured
                )
                print(
                    f"{method}: {measured['decode_tps']:.1f} tokens a second, "
                    f"{measured['seconds']:.1f} s in all, {measured['held_bytes'] / 1e6:.2f} MB",
                    flush=True,
                )
                mx.clear_cache()
        if args.json:
            keep(args, rows)


def keep(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write a record."""
    record = make_record(
        "batches",
        rows,
        command=typed_command("python -m scripts.bench_batches"),
        model=args.model or "bundled",
        backend="mlx",
        settings={"runs": args.runs, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset")},
    )
    write_record(args.json, record)


if __name__ == "__main__":
    main()
