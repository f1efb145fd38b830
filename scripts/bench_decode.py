"""One decode step's attention over the full cache and over the working set: counted, then timed.

    python scripts/bench_decode.py
    python scripts/bench_decode.py --backend torch --shape llama-8b --lengths 131072

First the work of all layers of Llama-3.1-8B by formula. Then one layer, both sides in turn in one
process; nothing is timed while the forms disagree where they must be equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xkv import load_backend
from xkv.checks.decode_step import (
    BUNDLED,
    LLAMA_8B,
    SMOLLM2,
    DecodeStep,
    StepShape,
    time_alternating,
)
from xkv.cli.openblas import KERNELS
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors
from xkv.ops.backend import Backend
from xkv.planning.chips import CHIPS, LENGTHS, milliseconds
from xkv.planning.decode_cost import total

SHAPES = {"llama-8b": LLAMA_8B, "smollm2": SMOLLM2, "bundled": BUNDLED}


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", choices=["mlx", "torch"], default="mlx", help="framework")
    parser.add_argument("--device", help="torch only: cpu or cuda; CUDA if there is one")
    parser.add_argument("--kernels", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="attention shapes")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--budget", type=int, help="recent rows and rebuilt ones, instead of the usual"
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--every-row", action="store_true", help="time that form too")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each form")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    options = {"kernels": args.kernels} | ({"device": args.device} if args.device else {})
    with user_errors():
        backend = load_backend(args.backend, **options)
        shape = replace(SHAPES[args.shape], budget=args.budget)
        shape = replace(shape, dtype=args.dtype or shape.dtype)
        problem = DecodeStep(backend, shape, 1024).parity()
        if problem is not None:
            sys.exit(f"error: no figures while the forms disagree: {problem}")
        print("\n".join(counted_lines(shape)))
        rows = counted_rows(shape) + print_timings(backend, shape, args)
        if args.backend == "mlx":
            rows += print_host_times()
        if args.json:
            about = {"shape": args.shape, "dtype": shape.dtype, "device": backend.device_name}
            threads = os.environ.get("OMP_NUM_THREADS", "unset")
            about |= {"layers": LLAMA_8B.model.n_layers, "OMP_NUM_THREADS": threads}
            about |= {KERNELS: os.environ.get(KERNELS, "unset")}
            about |= {"openblas": "preloaded" if is_openblas_preloaded() else "not preloaded"}
            command = typed_command("python scripts/bench_decode.py")
            model = "Llama-3.1-8B's shape" if args.shape == "llama-8b" else args.shape
            options = {"model": model, "backend": args.backend, "settings": about}
            write_record(args.json, make_record("decode", rows, command=command, **options))


def counted_lines(shape: StepShape) -> list[str]:
    """The work of a step of all layers of Llama-3.1-8B, by part, and what it takes on chips."""
    model, config = LLAMA_8B.model, replace(shape, model=LLAMA_8B.model).config
    lines = [
        f"counted: {model.n_layers} layers of Llama-3.1-8B, 8 x smaller, 16 bits, launches of "
        "Metal; milliseconds by arithmetic, without weights",
        f"{'tokens':>8}  {'':<20}{'GB':>8}{'GFLOP':>9}{'launches':>10}"
        + "".join(f"{chip.name:>10}" for chip in CHIPS),
    ]
    for n_tokens in LENGTHS:
        full, working_set = model.forms(config, n_tokens, is_metal=True)
        for name, parts in {
            "full": full,
            "working set": working_set,
            **{f"  {name}": {name: work} for name, work in working_set.items()},
        }.items():
            work, n = total(parts), model.n_layers
            ms = []
            for chip in CHIPS:
                on_chip = model.forms(config, n_tokens, chip.is_metal)[name != "full"]
                shown = {k: x for k, x in on_chip.items() if k in parts}
                ms.append(f"{milliseconds(chip, shown, n):>10.2f}")
            lines.append(
                f"{n_tokens:>8}  {name:<20}{n * work.n_bytes / 1e9:>8.2f}"
                f"{n * work.flops / 1e9:>9.2f}{n * work.launches:>10}{''.join(ms)}"
            )
    return lines


def counted_rows(shape: StepShape) -> list[dict[str, Any]]:
    """The work of a step of all layers of Llama-3.1-8B on each chip, as rows of a record."""
    model, config = LLAMA_8B.model, replace(shape, model=LLAMA_8B.model).config
    rows = []
    for n_tokens in LENGTHS:
        for chip in CHIPS:
            found = model.forms(config, n_tokens, chip.is_metal)
            for form, parts in zip(("full", "working set"), found, strict=True):
                work, n = total(parts), model.n_layers
                about = {"what": "counted", "tokens": n_tokens, "form": form, "chip": chip.name}
                counts = {"bytes": n * work.n_bytes, "flops": n * work.flops}
                counts |= {"launches": n * work.launches}
                rows.append({**about, "ms": milliseconds(chip, parts, n), **counts})
    return rows


def print_host_times() -> list[dict[str, Any]]:
    """How long Python and MLX take to make a layer's graph: printed, and as rows of a record."""
    from xkv.backends.mlx_metal.cli.host_time import IS_METAL, N_SEQUENCES, N_TOKENS, host_times

    times = host_times()
    print(
        f"\nhost, a layer of the bundled model at {N_TOKENS} tokens, kernels launched"
        + ("" if IS_METAL else " as one node each")
    )
    for n in N_SEQUENCES:
        full, ours = times[n, "full"], times[n, "working set"]
        whose = "one conversation" if n == 1 else f"{n} in a batch"
        print(f"  {whose}: full {full:.3f} ms, working set {ours:.3f} ms, {ours / full:.2f} x")
    return [
        {"what": "host", "tokens": N_TOKENS, "sequences": n, "form": form, "ms": ms}
        for (n, form), ms in times.items()
    ]


def is_openblas_preloaded() -> bool:
    return "openblas" in os.environ.get("LD_PRELOAD", "").lower()


def print_timings(
    backend: Backend, shape: StepShape, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One layer, measured: printed, and as rows of a record."""
    rows = []
    print(
        f"\nmeasured: one layer of {args.shape}, {shape.dtype}, {platform.machine()} "
        f"{platform.system()}, {args.backend} {version(args.backend)}, device "
        f"{backend.device_name}, {args.runs} runs, median [middle half]\n"
        f"OpenBLAS preloaded: {'yes' if is_openblas_preloaded() else 'no'}; "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"{KERNELS}={os.environ.get(KERNELS, 'unset')}"
    )
    print(f"{'tokens':>8}  {'form':<13}{'ms':>9}  {'spread':<19}{'MB counted':>11}{'GB/s':>8}  x")
    for n_tokens in args.lengths:
        step = DecodeStep(backend, shape, n_tokens)
        forms = step.forms()
        if not args.every_row:
            del forms["every row"]
        timings = time_alternating(backend, forms, args.runs)
        for name, timing in timings.items():
            moved = step.moved_bytes()[name]
            spread = f"[{timing.low_ms:.2f}, {timing.high_ms:.2f}]"
            print(
                f"{n_tokens:>8}  {name:<13}{timing.median_ms:>9.3f}  {spread:<19}"
                f"{moved / 1e6:>11.2f}{moved / timing.median_ms / 1e6:>8.1f}  "
                f"{timings['full'].median_ms / timing.median_ms:.2f}",
                flush=True,
            )
            about = {"what": "measured", "tokens": n_tokens, "form": name}
            times = {"ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
            rows.append({**about, **times, "bytes": moved})
    return rows


if __name__ == "__main__":
    main()
