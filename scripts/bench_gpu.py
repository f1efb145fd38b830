"""Decode over a full cache, a working set and every stored row, end to end on one device.

    python scripts/bench_gpu.py --out scripts/results/gpu
    python scripts/bench_gpu.py --device cpu --tiny

A Llama with random weights in the shapes of Llama-3.1-8B. Each form prefills one prompt; a larger
batch holds copies of its cache. Every figure is wall clock of the whole model on a synchronized
device, warm-up excluded. A step that folds the tail counts like any other.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_decoding import SHAPE, TINY, Bench
from gpu_factorizations import compare_factorizations
from gpu_rows import Row, markdown, summary

from xkv.checks.decode_step import BUNDLED, LLAMA_8B, DecodeStep
from xkv.errors import InputError


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--kernels", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--lengths", type=int, nargs="+", help="32k, 64k and 128k, or 1k and 2k")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="copies of a cache")
    parser.add_argument("--steps", type=int, default=144, help="timed steps of each batch")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each factorization")
    parser.add_argument(
        "--factorize-tokens", type=int, help="rows to factor; the middle length, 64k at most"
    )
    parser.add_argument(
        "--replay",
        nargs="?",
        const="also",
        choices=["also", "only"],
        help="decode in steps of constant shapes too, or only, on CUDA replays of one graph; full "
        "attention then over a cache that does not grow",
    )
    parser.add_argument("--max-seconds", type=float, help="begin no row that would begin later")
    parser.add_argument("--out", help="write OUT.json and OUT.md, anew after each row")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    args.lengths = args.lengths or ([1024, 2048] if args.tiny else [32768, 65536, 131072])
    if args.steps < 2 or args.runs < 2:
        sys.exit("error: --steps and --runs must be at least 2, for a median with spread")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device; try --device cpu --tiny")
    logging.basicConfig(format="%(message)s")
    try:
        _run(args)
    except InputError as error:
        sys.exit(f"error: {error}")


def _run(args: argparse.Namespace) -> None:
    bench = Bench(args)
    problem = DecodeStep(bench.backend, BUNDLED if args.tiny else LLAMA_8B, 1024).parity()
    if problem is not None:
        sys.exit(f"error: no figures while the forms disagree: {problem}")
    about = {
        "machine": f"{platform.machine()} {platform.system()}",
        "device": bench.backend.device_name,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "command": " ".join(["python", *sys.argv]),
        "model": TINY if args.tiny else SHAPE,
        "dtype": str(bench.dtype),
        "forms": bench.forms,
    }
    print(f"{about['device']}, {about['versions']}, {args.steps} steps, {about['dtype']}")
    rows: list[Row] = []
    factorizations: list[dict[str, Any]] = []
    for row in bench.run():
        rows.append(row)
        print(", ".join(f"{name} {text}" for name, text in row.cells().items()), flush=True)
        _write(args.out, about, bench, rows, factorizations)
    if not bench.is_late("factorizations"):
        rank = 24 if args.tiny else 384
        factorizations += compare_factorizations(bench.backend, bench.group_keys(), rank, args.runs)
    _write(args.out, about, bench, rows, factorizations)
    print(f"\n{_report(bench, rows, factorizations)}")


def _write(
    out: str | None,
    about: dict[str, Any],
    bench: Bench,
    rows: list[Row],
    factorizations: list[dict[str, Any]],
) -> None:
    """Both files, with what is known so far."""
    if not out:
        return
    found = {
        "rows": [asdict(row) for row in rows],
        "left_out": bench.left_out,
        "factorizations": factorizations,
    }
    Path(f"{out}.json").write_text(json.dumps(about | found, indent=2) + "\n")
    head = f"`{about['command']}` on {about['device']}, {about['versions']}, {about['dtype']}"
    Path(f"{out}.md").write_text(f"{head}\n\n{_report(bench, rows, factorizations)}\n")


def _report(bench: Bench, rows: list[Row], factorizations: list[dict[str, Any]]) -> str:
    lines = [*summary(rows), *(f"Left out: {sentence}" for sentence in bench.left_out)]
    parts = [
        markdown([row.cells() for row in rows]),
        "\n".join(f"* {line}" for line in lines),
        markdown([{k: _short(x) for k, x in entry.items()} for entry in factorizations]),
    ]
    return "\n\n".join(part for part in parts if part)


def _short(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


if __name__ == "__main__":
    main()
