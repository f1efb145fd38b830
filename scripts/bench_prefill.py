"""Peak memory, memory held and time of a prefill: mlx-lm's own cache beside the compressed one.

    python -m scripts.bench_prefill --tokens 8192 --compression 8

A random model, both sides in one process, in turn. On MLX's CPU build attention is not fused, so a
large --prefill-step-size would hide the cache behind its workspace.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

import xkv
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors


class Run(NamedTuple):
    """One prefill: bytes above the weights, seconds to the first token, and of them those that
    factoring and coding take."""

    peak_bytes: int
    held_bytes: int
    seconds: float
    factor_seconds: float


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--prefill-step-size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    return parser


def make_model(args: argparse.Namespace) -> Model:
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            intermediate_size=2 * args.hidden_size,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=1000,
            max_position_embeddings=1 << 20,
        )
    )
    mx.eval(model.parameters())
    return model


def active_memory() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def prefill(model: Any, n_tokens: int, step_size: int) -> Run:
    """Prefill a new prompt cache and decode one token."""
    prompt = mx.random.randint(0, 1000, (n_tokens,), key=mx.random.key(1))
    mx.eval(prompt)
    before = active_memory()
    mx.reset_peak_memory()
    cache = make_prompt_cache(model)
    began = time.perf_counter()
    steps = generate_step(
        prompt, model, max_tokens=1, prompt_cache=cache, prefill_step_size=step_size
    )
    next(steps)
    seconds = time.perf_counter() - began
    peak = mx.get_peak_memory() - before
    del steps
    is_ours = isinstance(cache[0], XKVCache)
    factor_seconds = cache[0].layer.cache.factorize_seconds if is_ours else 0.0
    return Run(peak, active_memory() - before, seconds, factor_seconds)


def main() -> None:
    args = setup_arg_parser().parse_args()
    model = make_model(args)
    runs: dict[str, list[Run]] = {"mlx-lm": [], "xKV": []}
    for _ in range(args.runs):
        runs["mlx-lm"].append(prefill(model, args.tokens, args.prefill_step_size))
        xkv.enable(model, compression=args.compression)
        runs["xKV"].append(prefill(model, args.tokens, args.prefill_step_size))
        xkv.disable(model)
    medians = {
        name: Run(*(statistics.median(column) for column in zip(*found, strict=True)))
        for name, found in runs.items()
    }
    for name, run in medians.items():
        spread = [each.seconds for each in runs[name]]
        print(
            f"{name:7} peak {run.peak_bytes / 1e6:8.1f} MB  held {run.held_bytes / 1e6:8.1f} MB  "
            f"{run.seconds:6.1f} s ({min(spread):.1f} to {max(spread):.1f})"
        )
    theirs, ours = medians["mlx-lm"], medians["xKV"]
    shares = [mine / other for mine, other in zip(ours[:3], theirs[:3], strict=True)]
    print("xKV of mlx-lm: peak {:.3f}, held {:.3f}, time {:.3f}".format(*shares))
    share = ours.factor_seconds / (ours.seconds - ours.factor_seconds)
    print(f"factoring and coding: {ours.factor_seconds:.1f} s, {share:.3f} of the rest of it")
    if args.json:
        with user_errors():
            keep(args, medians, runs)


def keep(args: argparse.Namespace, medians: dict[str, Run], runs: dict[str, list[Run]]) -> None:
    """Write a record."""
    rows = [
        {
            "tokens": args.tokens,
            "side": name,
            **run._asdict(),
            "peak_bytes": int(run.peak_bytes),
            "held_bytes": int(run.held_bytes),
            "low_seconds": min(each.seconds for each in runs[name]),
            "high_seconds": max(each.seconds for each in runs[name]),
        }
        for name, run in medians.items()
    ]
    about = {"compression": args.compression, "chunk": args.prefill_step_size, "runs": args.runs}
    heads = f"{args.kv_heads} KV heads of {args.hidden_size // args.heads}"
    record = make_record(
        "prefill",
        rows,
        command=typed_command("python -m scripts.bench_prefill"),
        model=f"random weights, {args.layers} layers, hidden size {args.hidden_size}, {heads}",
        backend="mlx",
        settings=about,
    )
    write_record(args.json, record)


if __name__ == "__main__":
    main()
