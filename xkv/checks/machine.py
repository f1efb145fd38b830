"""What works on this machine, and how fast."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from xkv.checks.decode_step import LLAMA_8B, DecodeStep, StepShape, time_alternating
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.loading import load_backend
from xkv.ops.selection import chunk_rows

PACKAGES = ("xkv", "mlx", "mlx-lm", "torch", "transformers", "triton", "numpy")
DTYPES = ("float16", "bfloat16", "float32")
CHECK_TOKENS = 1024
CHECK_BITS = (16, 8, 6, 5, 4, 3, 2)
"""Of the parts of packed latents."""


def examine(
    backend_name: str, lengths: list[int], max_seconds: float, say: Callable[..., Any]
) -> dict[str, Any]:
    """Check and time everything.

    Args:
        backend_name: "mlx" or "torch".
        lengths: Tokens in the cache of each timing.
        max_seconds: A length that would take longer by the one before it is left out.
        say: Called with each line of the report as it is known.

    Returns:
        The report, ready for JSON.
    """
    plain = load_backend(backend_name, kernels="off")
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "backend": backend_name,
        "device": plain.device_name,
    }
    say(f"machine   {report['machine']}, Python {report['python']}")
    say("packages  " + ", ".join(f"{k} {v}" for k, v in report["packages"].items()))
    say(f"device    {report['device']} ({backend_name})")
    report["kernels"] = _check_kernels(backend_name, plain, say)
    report["attention"] = _time_attention(backend_name, lengths, max_seconds, say)
    report["verdict"] = _verdict(report)
    say(f"verdict   {report['verdict']}")
    return report


def _check_kernels(
    backend_name: str, plain: Backend, say: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Run each kernel where it must run, which checks it against its twin, and time both."""
    found = []
    for dtype in DTYPES:
        strict = load_backend(backend_name, kernels="on")
        shape = replace(LLAMA_8B, dtype=dtype)
        operations = _operations(DecodeStep(plain, shape, CHECK_TOKENS))
        packed = DecodeStep(plain, replace(shape, latent_bits=CHECK_BITS), CHECK_TOKENS)
        for name, operation in _operations(packed).items():
            if name != "chunk_scores":
                operations[f"{name}, packed"] = operation
        for name, operation in operations.items():
            found.append({"kernel": name, "dtype": dtype, **_check(operation, strict, plain)})
    problem = load_backend(backend_name).kernels.device_problem()
    if problem:
        say(f"kernels   none could be checked: {problem}")
        return found
    for entry in found:
        if entry["status"] == "agrees":
            ratio = entry["plain_ms"] / entry["kernel_ms"]
            text = f"agrees, {entry['kernel_ms']:.3f} ms, {ratio:.1f} x its plain twin's speed"
        else:
            text = f"FAILED: {entry['why']}"
        say(f"kernels   {entry['kernel']} {entry['dtype']}: {text}")
    return found


def _check(operation: Callable[[Backend], Any], strict: Backend, plain: Backend) -> dict[str, Any]:
    """Status of one kernel, and its time beside its twin's."""
    try:
        strict.evaluate(operation(strict))
    except InputError as error:
        is_there = strict.kernels.device_problem() is None
        return {"status": "failed" if is_there else "not checked", "why": str(error)}
    pair = {"kernel": lambda: operation(strict), "plain": lambda: operation(plain)}
    timings = time_alternating(plain, pair, 9)
    return {
        "status": "agrees",
        "kernel_ms": timings["kernel"].median_ms,
        "plain_ms": timings["plain"].median_ms,
    }


def _operations(step: DecodeStep) -> dict[str, Callable[[Backend], Any]]:
    """The fused operations on a step's arrays, by name."""
    chunks = step.backend.select_chunks(step.queries, step.landmarks, 256, step.scale)
    size, dense = step.shape.chunk_size, (step.dense_keys, step.dense_values, step.scale)
    rows = chunk_rows(step.backend, chunks, size)
    return {
        "reconstruct_rows": lambda b: b.reconstruct_rows(step.segment, rows),
        "lowrank_attention": lambda b: b.lowrank_attention(step.queries, step.segment, *dense),
        "selected_attention": lambda b: b.selected_attention(
            step.queries, step.segment, chunks, size, *dense
        ),
        "chunk_scores": lambda b: b.chunk_scores(step.queries, step.landmarks, step.scale),
    }


def _time_attention(
    backend_name: str, lengths: list[int], max_seconds: float, say: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Time one layer's decode attention of an 8B model in its three forms."""
    backend = load_backend(backend_name)
    shape = LLAMA_8B if backend.device_name != "cpu" else replace(LLAMA_8B, dtype="float32")
    say(f"attention of one layer, 32 heads, 8 KV heads of 128, ranks 384/576, {shape.dtype}")
    found: list[dict[str, Any]] = []
    seconds, last_length = 0.0, 0
    for n_tokens in sorted(lengths):
        entry: dict[str, Any] = {"tokens": n_tokens}
        expected = seconds * n_tokens / last_length if last_length else 0.0
        if expected > max_seconds:
            entry["left_out"] = f"would take about {expected:.0f} s; raise --max-seconds"
        elif _bytes_needed(shape, n_tokens) > _memory_bytes() / 2:
            entry["left_out"] = f"needs {_bytes_needed(shape, n_tokens) / 1e9:.0f} GB of memory"
        if "left_out" in entry:
            say(f"  {n_tokens:>7} tokens: left out: {entry['left_out']}")
            found.append(entry)
            continue
        began = time.perf_counter()
        step = DecodeStep(backend, shape, n_tokens)
        timings = time_alternating(backend, step.forms(), 3)
        seconds, last_length = time.perf_counter() - began, n_tokens
        entry |= {f"{name}_ms": timing.median_ms for name, timing in timings.items()}
        found.append(entry)
        full = timings["full"].median_ms
        parts = [
            f"{k} {t.median_ms:.2f} ms ({full / t.median_ms:.2f} x)" for k, t in timings.items()
        ]
        say(f"  {n_tokens:>7} tokens: " + ", ".join(parts))
    return found


def _verdict(report: dict[str, Any]) -> str:
    failed = [k for k in report["kernels"] if k["status"] == "failed"]
    timed = [a for a in report["attention"] if "left_out" not in a]
    speed = ""
    if timed:
        last = timed[-1]
        ratio = last["full_ms"] / last["selective_ms"]
        speed = f"; selective attention runs at {ratio:.1f} x full attention at {last['tokens']}"
    if failed:
        names = ", ".join(sorted({k["kernel"] for k in failed}))
        return f"works on plain operations where kernels fail ({names}){speed}"
    if any(k["status"] == "not checked" for k in report["kernels"]):
        return f"works on plain operations; the kernels could not be checked here{speed}"
    return f"all kernels compile and agree{speed}"


def _bytes_needed(shape: StepShape, n_tokens: int) -> int:
    """Rough peak of one timing: dense rows, factors and their float32 drafts."""
    width = shape.n_kv_heads * shape.head_dim
    return 4 * shape.batch * n_tokens * (4 * width + 2 * (shape.rank_k + shape.rank_v))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
