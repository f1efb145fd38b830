"""Several conversations in one batch of mlx-lm's, with the full cache and with compressed ones.

    python -m scripts.bench_batches --model M --sequences 4 --tokens 2048

Both sides in one process, in turn, through mlx-lm's own ``BatchGenerator``: prompts of a few
unequal lengths, then answers of a fixed length. Then as in a server: an answer that runs, and how
long it waits for its next token while another prompt goes in.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from queue import Queue
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

import xkv
from scripts.bench_models import bench_parser, enabled_model
from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.batches import Batches
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


def time_joining(batches: Any, prompts: list[list[int]]) -> dict[str, float]:
    """What the answer to one prompt notices of another that goes in.

    Args:
        batches: Empty.
        prompts: Two.

    Returns:
        Seconds: the longest between two tokens of the first, and to the first of the second.
    """
    batches.insert(prompts[:1])
    last, gaps, joined = None, [], None
    while True:
        _, generated = batches.next()
        now = time.perf_counter()
        if not generated:
            continue
        if len(generated) > 1:
            assert joined is not None
            return {"longest_gap": max(gaps), "first_token": now - joined}
        if joined is not None:
            gaps.append(now - last)
        elif last is not None:
            batches.insert(prompts[1:])
            joined = now
        last = now


def joining_batch(model: Any, is_enabled: bool) -> Any:
    """mlx-lm's batch, or what the server takes in its place, with room for a long answer."""
    options = {"max_tokens": 100_000, "completion_batch_size": 2, "prefill_batch_size": 1}
    if not is_enabled:
        return BatchGenerator(model, **options)
    arguments = SimpleNamespace(stop_words=[], logprobs=False, top_logprobs=0)

    def answers() -> Answers:
        return Answers(Queue(), arguments, lambda: None)

    return Batches(answers, lambda tokens, cache: None, model, **options)


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.runs < 1 or args.sequences < 2 or args.tokens <= args.sequences * APART:
        parser.error("--runs must be at least 1 and --sequences 2, with some tokens for each")
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
                batch = joining_batch(model, ratio is not None)
                measured |= time_joining(batch, prompts[:2])
                batch.close()
                del batch
                if ratio is not None:
                    xkv.disable(model)
                rows.append(
                    {"sequences": len(prompts), "tokens": args.tokens, "method": method}
                    | {"ratio": ratio, "run": run}
                    | measured
                )
                print(
                    f"{method}: {measured['decode_tps']:.1f} tokens a second, "
                    f"{measured['seconds']:.1f} s in all, {measured['held_bytes'] / 1e6:.2f} MB; "
                    f"{measured['longest_gap']:.2f} s without a token while another prompt goes "
                    f"in, whose first came after {measured['first_token']:.2f} s",
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
