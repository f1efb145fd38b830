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
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

import xkv
from scripts.bench_models import bench_parser, enabled_model
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors
from xkv.tiny import make_document

N_ANSWER = 48
APART = 37
"""Tokens by which each prompt is shorter than the one before it."""


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = bench_parser(__doc__, 2048, "of the longest prompt")
    parser.add_argument("--sequences", type=int, default=4)
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
        model, tokenizer, config = enabled_model(args)
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
