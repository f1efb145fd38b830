"""First token of a prompt whose beginning is on disk, beside computing it again.

    python -m scripts.bench_prefixes --model M --tokens 4096

Both sides in one process, in turn. For each run the beginning is written to a folder of its own and
found there by a new server's cache, which knows no more than the files; they may still be in the
system's own cache of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from scripts.bench_models import bench_parser, enabled_model
from xkv.backends.mlx_metal.model.enabled import prefill_prompt
from xkv.backends.mlx_metal.server.disk import Disk
from xkv.backends.mlx_metal.server.disk_cache import DiskPromptCache
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors
from xkv.tiny import make_document

AGAIN, FROM_DISK = "computed again", "read from disk"
N_QUESTION = 32
"""Tokens of the prompt that are on neither side there."""
STEP_SIZE = 2048


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = bench_parser(__doc__, 4096, "of the beginning")
    return parser


def first_token(model: Any, cache: list[Any], tokens: list[int]) -> None:
    """Take the rest of a prompt into a cache, and decode one token."""
    steps = generate_step(
        mx.array(tokens), model, max_tokens=1, prompt_cache=cache, prefill_step_size=STEP_SIZE
    )
    next(steps)


def time_run(model: Any, prompt: list[int], folder: Path, run: int) -> list[dict[str, Any]]:
    """Both sides once, as rows of a record."""
    beginning = prompt[:-N_QUESTION]
    cache = make_prompt_cache(model)
    prefill_prompt(model, cache, mx.array(beginning), STEP_SIZE)
    began = time.perf_counter()
    first_token(model, make_prompt_cache(model), prompt)
    again = time.perf_counter() - began

    def kept() -> DiskPromptCache:
        return DiskPromptCache(4, None, Disk(folder, 1 << 40), lambda: [model])

    server = kept()
    began = time.perf_counter()
    server.insert_cache("model", beginning, cache)
    server.close()
    write_seconds = time.perf_counter() - began
    server = kept()
    began = time.perf_counter()
    found, rest = server.fetch_nearest_cache("model", prompt)
    assert found is not None and len(rest) == N_QUESTION
    first_token(model, found, rest)
    seconds = time.perf_counter() - began
    n_bytes = server.report()["disk"]["held_bytes"]
    server.close()
    about = {"tokens": len(beginning), "run": run}
    return [
        {**about, "side": AGAIN, "seconds": again},
        {**about, "side": FROM_DISK, "seconds": seconds, "bytes": n_bytes}
        | {"write_seconds": write_seconds},
    ]


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.runs < 1 or args.tokens < 1:
        parser.error("--runs and --tokens must be at least 1")
    with user_errors():
        model, tokenizer, _ = enabled_model(args)
        text = make_document(1, 2 * args.tokens).text
        prompt = tokenizer.encode(text)[: args.tokens + N_QUESTION]
        rows = []
        for run in range(1, args.runs + 1):
            with tempfile.TemporaryDirectory() as folder:
                rows += time_run(model, prompt, Path(folder), run)
            print(f"{AGAIN} {rows[-2]['seconds']:.3f} s, {FROM_DISK} {rows[-1]['seconds']:.3f} s")
        again, found = (
            statistics.median(row["seconds"] for row in rows if row["side"] == side)
            for side in (AGAIN, FROM_DISK)
        )
        last = rows[-1]
        print(
            f"{last['tokens']} tokens, {last['bytes'] / 1e6:.2f} MB on disk, written in "
            f"{last['write_seconds']:.3f} s; first token in {found / again:.4f} of the time"
        )
        if args.json:
            keep(args, rows)


def keep(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write a record."""
    record = make_record(
        "prefixes",
        rows,
        command=typed_command("python -m scripts.bench_prefixes"),
        model=args.model or "bundled",
        backend="mlx",
        settings={
            "compression": args.compression,
            "runs": args.runs,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        },
    )
    write_record(args.json, record)


if __name__ == "__main__":
    main()
