"""One layer's decode step on CUDA by its operations, each timed as replays of a graph.

    python scripts/gpu_step.py
    python scripts/gpu_step.py --tokens 131072 --batches 1 4

The layer is Llama-3.1-8B's, its rows random, in bfloat16. The framework's attention over the full
cache and the step over the working set come first, then each operation of that step on what the
step gave it: their launches are in the graph, the host's time is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from xkv.backends.torch_cuda import TorchBackend
from xkv.checks.decode_step import BUNDLED, LLAMA_8B, DecodeStep

OPERATIONS = (
    *("attend_dense", "query_terms", "index_scores"),
    *("choose_rows", "key_scores", "weigh_rows", "add_product"),
)
CALLS, REPLAYS = 20, 9
"""Calls in a graph, and how often it is replayed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda; cpu runs each once, untimed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device; try --device cpu")
    backend = TorchBackend(args.device)
    shape = LLAMA_8B if args.device == "cuda" else BUNDLED
    print(f"{backend.device_name}, torch {torch.__version__}, {shape.dtype}, us a layer")
    print("| tokens | batch | full | working set | x | " + " | ".join(OPERATIONS) + " |")
    print("| --- " * (5 + len(OPERATIONS)) + "|")
    for n_tokens in args.tokens:
        for batch in args.batches:
            step = DecodeStep(backend, replace(shape, batch=batch), n_tokens)
            full, ours = (microseconds(args.device, x) for x in (step.full, step.working_set))
            parts = [
                microseconds(args.device, lambda run=run, given=given: run(*given))
                for run, given in operations(backend, step)
            ]
            cells = [
                f"{n_tokens:,}",
                str(batch),
                f"{full:.1f}",
                f"{ours:.1f}",
                f"{full / ours:.2f}",
            ]
            print("| " + " | ".join([*cells, *(f"{x:.1f}" for x in parts)]) + " |", flush=True)


def operations(backend: TorchBackend, step: DecodeStep) -> list[tuple[Callable[..., Any], Any]]:
    """Each operation of a step, and its arguments there."""
    given: dict[str, tuple[Any, ...]] = {}

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            given[name] = args
            return run(*args)

        return call

    for name in OPERATIONS:
        setattr(backend, name, noted(name, getattr(backend, name)))
    step.working_set()
    for name in OPERATIONS:
        delattr(backend, name)
    return [(getattr(backend, name), given[name]) for name in OPERATIONS]


def microseconds(device: str, run: Callable[[], Any]) -> float:
    """The median time of a call on the device; not a number where there is none."""
    run()
    if device == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / CALLS * 1e3)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
