"""Decode attention of one layer: full, dense low-rank and selective, timed in turn in one process.

    python scripts/bench_decode.py
    python scripts/bench_decode.py --backend torch --shape llama-8b --lengths 131072

It prints nothing while the three forms disagree where they must be equal.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import asdict, replace
from importlib.metadata import version

from xkv import InputError, load_backend
from xkv.checks.decode_step import BUNDLED, LLAMA_8B, DecodeStep, time_alternating
from xkv.config import BAND
from xkv.store.codec import BITS

SHAPES = {"bundled": BUNDLED, "llama-8b": LLAMA_8B}


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", choices=["mlx", "torch"], default="mlx", help="framework")
    parser.add_argument("--device", help="torch only: cpu or cuda; CUDA if there is one")
    parser.add_argument("--kernels", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--shape", choices=SHAPES, default="bundled", help="attention shapes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")
    for name in ("budget", "rank-k", "rank-v", "landmark-bits"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's own")
    parser.add_argument(
        "--latent-bits",
        type=int,
        nargs="+",
        choices=BITS,
        help="pack the factors in parts of these bits, about equally wide; ranks become multiples "
        f"of {BAND}",
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each form")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    options = {"kernels": args.kernels}
    if args.device:
        options["device"] = args.device
    try:
        backend = load_backend(args.backend, **options)
    except InputError as error:
        sys.exit(f"error: {error}")
    names = ("budget", "rank_k", "rank_v", "landmark_bits", "dtype")
    shape = replace(SHAPES[args.shape], **{n: vars(args)[n] for n in names if vars(args)[n]})
    shape = replace(shape, latent_bits=tuple(args.latent_bits or ()))
    problem = DecodeStep(backend, shape, 1024).parity()
    if problem is not None:
        sys.exit(f"error: no figures while the forms disagree: {problem}")
    print(
        f"{platform.machine()} {platform.system()}, {args.backend} {version(args.backend)}, "
        f"device {backend.device_name}, {args.runs} runs, median [middle half]"
    )
    print(", ".join(f"{name}={value}" for name, value in asdict(shape).items() if name != "batch"))
    print(
        f"{'tokens':>8} {'batch':>5}  {'form':<15}{'ms':>9}  {'spread':<19}{'MB':>9}{'GB/s':>8}  x"
    )
    for batch in args.batch:
        for n_tokens in args.lengths:
            step = DecodeStep(backend, replace(shape, batch=batch), n_tokens)
            timings = time_alternating(backend, step.forms(), args.runs)
            for name, timing in timings.items():
                moved = step.moved_bytes()[name]
                spread = f"[{timing.low_ms:.2f}, {timing.high_ms:.2f}]"
                print(
                    f"{n_tokens:>8} {batch:>5}  {name:<15}{timing.median_ms:>9.3f}  {spread:<19}"
                    f"{moved / 1e6:>9.2f}{moved / timing.median_ms / 1e6:>8.1f}  "
                    f"{timings['full'].median_ms / timing.median_ms:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
