"""What works on this machine, and how fast."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xkv.checks.decode_step import LLAMA_8B, DecodeStep, StepShape, time_alternating
from xkv.cli.this_machine import memory_bytes, versions
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.index import absorbed_queries, index_basis
from xkv.ops.latent import Latent
from xkv.ops.loading import load_backend
from xkv.planning.chips import CUDA_LAUNCH_US, METAL_LAUNCH_US, Chip, milliseconds

DTYPES = ("float16", "bfloat16", "float32")
READ_LATENTS = ("index_scores", "key_scores", "weigh_rows")
"""Operations that are checked on a packed latent and on a plain one."""

CHECK_TOKENS = 1024
CHECK_BITS = (8, 6, 5, 4, 3, 2)
"""Of the bands of packed latents."""
COPIED_BYTES, SIDE = {"cpu": 1 << 26, "gpu": 1 << 28}, {"cpu": 1024, "gpu": 4096}
"""Of the array that is read and written, and the matrices that are multiplied, to rate a device."""


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
        The report; :func:`report_rows` makes rows of it.
    """
    plain = load_backend(backend_name, kernels="off")
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions(),
        "backend": backend_name,
        "device": plain.device_name,
    }
    say(f"machine   {report['machine']}")
    say("packages  " + ", ".join(f"{k} {v}" for k, v in report["packages"].items()))
    say(f"device    {report['device']} ({backend_name})")
    report["kernels"] = _check_kernels(backend_name, plain, say)
    report["attention"] = _time_attention(backend_name, lengths, max_seconds, say)
    report["estimate"] = _estimate(plain, sorted(lengths), say)
    report["verdict"] = _verdict(report)
    say(f"verdict   {report['verdict']}")
    return report


def report_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A report's times, each beside what it is compared with: a plain twin, or full attention."""
    dtype, model = LLAMA_8B.dtype, "Llama-3.1-8B in 4 bits, by arithmetic"
    rows: list[dict[str, Any]] = []
    for x in report["kernels"]:
        about = {"what": "kernel", "name": x["kernel"], "tokens": CHECK_TOKENS, "dtype": x["dtype"]}
        rows.append(about | _times(x, "kernel_ms", "plain_ms"))
    for x in report["attention"]:
        about = {"what": "attention", "name": "one layer", "tokens": x["tokens"], "dtype": dtype}
        rows.append(about | _times(x, "working_set_ms", "full_ms"))
    for x in report["estimate"]["decode"]:
        about = {"what": "decode step", "name": model, "tokens": x["tokens"], "dtype": dtype}
        rows.append(about | _times(x, "working_set_ms", "full_ms"))
    return rows


def _times(entry: dict[str, Any], ours: str, baseline: str) -> dict[str, Any]:
    if ours in entry:
        return {"ms": entry[ours], "baseline_ms": entry[baseline]}
    if "left_out" in entry:
        return {"problem": f"left out: {entry['left_out']}"}
    return {"problem": f"{entry['status']}: {entry['why']}"}


def _check_kernels(
    backend_name: str, plain: Backend, say: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Run each kernel where it must run, which checks it against its twin, and time both."""
    found = []
    model = replace(LLAMA_8B.model, bits=(CHECK_BITS, CHECK_BITS))
    for dtype in DTYPES:
        strict = load_backend(backend_name, kernels="on")
        step = DecodeStep(plain, replace(LLAMA_8B, model=model, dtype=dtype), CHECK_TOKENS)
        operations = _operations(step, is_packed=False)
        packed = _operations(step, is_packed=True)
        operations |= {f"{name}, packed": packed[name] for name in READ_LATENTS}
        for name, operation in operations.items():
            status = _check(operation, strict, plain)
            # without a kernel, nothing but the twin ran
            if "why" in status or name.split(",")[0] in strict.kernels.last_path:
                found.append({"kernel": name, "dtype": dtype, **status})
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


def _check(
    operation: Callable[[Backend], list[Any]], strict: Backend, plain: Backend
) -> dict[str, Any]:
    """Status of one kernel, and its time beside its twin's."""
    try:
        strict.evaluate(*operation(strict))
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


def _operations(step: DecodeStep, is_packed: bool) -> dict[str, Callable[[Backend], list[Any]]]:
    """The fused operations on a step's arrays, by name."""
    backend, xp, (keys, values) = step.backend, step.backend.xp, step.stored
    if not is_packed:
        keys, values = (
            x._replace(latent=Latent((x.latent.unpack(backend),))) for x in (keys, values)
        )
    queries, dense = step.queries * step.scale, step.dense
    basis, spec = index_basis(backend, keys), keys.rope_runs[0].spec
    absorbed = absorbed_queries(backend, queries, keys)
    offsets = xp.astype(absorbed[:, 0, 0] * 0, xp.float32)
    n_kv_heads, n_rebuilt = step.layer.group.n_kv_heads, step.n_rebuilt
    worth = backend.index_scores(absorbed, keys.latent, offsets, n_kv_heads)
    rows = backend.choose_rows(worth, n_rebuilt)
    beside, totals = backend.attend_dense(queries, dense, None)
    scores = backend.key_scores(keys, rows, queries)
    return {
        "attend_dense": lambda b: [*b.attend_dense(queries, dense, None)],
        "query_terms": lambda b: [b.query_terms(queries, basis, spec)],
        "index_scores": lambda b: [b.index_scores(absorbed, keys.latent, offsets, n_kv_heads)],
        "choose_rows": lambda b: [b.choose_rows(worth, n_rebuilt)],
        "key_scores": lambda b: [b.key_scores(keys, rows, queries)],
        "weigh_rows": lambda b: [*b.weigh_rows(values.latent, rows, scores, totals, beside)],
    }


def _time_attention(
    backend_name: str, lengths: list[int], max_seconds: float, say: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Time one layer's decode attention of an 8B model over the full cache and the working set."""
    backend, shape = load_backend(backend_name), LLAMA_8B
    say(f"attention of one layer, 32 heads, 8 KV heads of 128, 8 x smaller, {shape.dtype}")
    found: list[dict[str, Any]] = []
    seconds, last_length = 0.0, 0
    for n_tokens in sorted(lengths):
        entry: dict[str, Any] = {"tokens": n_tokens}
        expected = seconds * n_tokens / last_length if last_length else 0.0
        if expected > max_seconds:
            entry["left_out"] = f"would take about {expected:.0f} s; raise --max-seconds"
        elif _bytes_needed(shape, n_tokens) > memory_bytes() / 2:
            entry["left_out"] = f"needs {_bytes_needed(shape, n_tokens) / 1e9:.0f} GB of memory"
        if "left_out" in entry:
            say(f"  {n_tokens:>7} tokens: left out: {entry['left_out']}")
            found.append(entry)
            continue
        began = time.perf_counter()
        step = DecodeStep(backend, shape, n_tokens)
        forms = {name: form for name, form in step.forms().items() if name != "every row"}
        timings = time_alternating(backend, forms, 3)
        seconds, last_length = time.perf_counter() - began, n_tokens
        entry |= {f"{name.replace(' ', '_')}_ms": x.median_ms for name, x in timings.items()}
        found.append(entry)
        full = timings["full"].median_ms
        parts = [
            f"{k} {t.median_ms:.2f} ms ({full / t.median_ms:.2f} x)" for k, t in timings.items()
        ]
        say(f"  {n_tokens:>7} tokens: " + ", ".join(parts))
    return found


def _estimate(backend: Backend, lengths: list[int], say: Callable[..., Any]) -> dict[str, Any]:
    """Rate the device, and say what it makes a decode step of Llama-3.1-8B by arithmetic."""
    chip, model = measured_chip(backend), LLAMA_8B.model
    entries = []
    for n_tokens in lengths:
        full, working_set = (
            milliseconds(chip, parts, model.n_layers, model.weight_bytes)
            for parts in model.forms(LLAMA_8B.config, n_tokens, chip.is_metal)
        )
        entries.append({"tokens": n_tokens, "full_ms": full, "working_set_ms": working_set})
    say(
        f"estimate  {chip.bandwidth / 1e9:.3g} GB/s and {chip.products / 1e12:.3g} TFLOP/s measured"
        "; Llama-3.1-8B in 4 bits by arithmetic, full cache and working set: "
        + ", ".join(
            f"{x['full_ms']:.1f} and {x['working_set_ms']:.1f} ms a token at {x['tokens']}"
            for x in entries
        )
    )
    return {"bandwidth": chip.bandwidth, "products": chip.products, "decode": entries}


def measured_chip(backend: Backend) -> Chip:
    """This device by two small timings."""
    xp, kind = backend.xp, "cpu" if backend.device_name == "cpu" else "gpu"
    dtype = backend.step_dtype(xp.bfloat16)
    shape = COPIED_BYTES[kind] // 4096, 1024
    numbers = xp.ones(shape, dtype=xp.float32, **backend.placement)
    matrix = xp.ones((SIDE[kind], SIDE[kind]), dtype=dtype, **backend.placement)
    backend.evaluate(numbers, matrix)
    forms = {"copy": lambda: [numbers + 1], "product": lambda: [matrix @ matrix]}
    seconds = {k: x.median_ms / 1e3 for k, x in time_alternating(backend, forms, 5).items()}
    is_metal = backend.name == "mlx"
    return Chip(
        backend.device_name,
        2 * COPIED_BYTES[kind] / seconds["copy"],
        2 * SIDE[kind] ** 3 / seconds["product"],
        METAL_LAUNCH_US if is_metal else CUDA_LAUNCH_US,
        is_metal,
        "measured",
    )


def _verdict(report: dict[str, Any]) -> str:
    failed = [k for k in report["kernels"] if k["status"] == "failed"]
    timed = [a for a in report["attention"] if "left_out" not in a]
    speed = ""
    if timed:
        last = timed[-1]
        ratio = last["full_ms"] / last["working_set_ms"]
        speed = f"; the working set runs at {ratio:.1f} x full attention at {last['tokens']}"
    if failed:
        names = ", ".join(sorted({k["kernel"] for k in failed}))
        return f"works on plain operations where kernels fail ({names}){speed}"
    if any(k["status"] == "not checked" for k in report["kernels"]):
        return f"works on plain operations; the kernels could not be checked here{speed}"
    return f"all kernels compile and agree{speed}"


def _bytes_needed(shape: StepShape, n_tokens: int) -> int:
    """Rough peak of one timing: dense rows, wide copies of them, and latents."""
    layer = shape.layer(n_tokens)
    latents = sum(layer.latent_row_bytes(x) for x in (layer.key_bits, layer.value_bits))
    dense = layer.group.row_elements * (layer.item_bytes + 4)
    return shape.batch * n_tokens * (dense + 2 * latents)
