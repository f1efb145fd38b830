"""The longest context that fits into memory, by kind of KV cache, as a table."""

from __future__ import annotations

import argparse
import math
from typing import Any

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.loading import load_backend_module
from xkv.planning.footprint import (
    STEP_TOKENS,
    Cache,
    CompressedCache,
    ModelFacts,
    NativeCache,
    longest_context,
)
from xkv.tiny import CHECKPOINT_DIR, SELECTION

DEFAULT_CONTEXT = 65536


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, ready for JSON; sizes in bytes.

    Raises:
        InputError: If a flag is out of range, there is no such model, or its weights do not fit.
    """
    configs = [XKVConfig(args.group_size, compression=ratio) for ratio in args.compression]
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise InputError(f"--memory {args.memory:g} must be above 0 (GB)")
    if args.context is not None and args.context < 1:
        raise InputError(f"--context {args.context} must be at least 1")
    mlx = load_backend_module("mlx")
    selection: dict[str, Any] = {} if args.model else dict(SELECTION)
    config = XKVConfig(args.group_size, **selection)
    facts: ModelFacts = mlx.read_facts(args.model or str(CHECKPOINT_DIR), config)
    memory = mlx.memory_bytes() if args.memory is None else int(args.memory * 1e9)
    if facts.weight_bytes > memory:
        raise InputError(
            f"the weights alone take {facts.weight_bytes / 1e9:.2f} GB, more than the memory of "
            f"{memory / 1e9:.2f} GB: take a smaller model or fewer bits a weight"
        )
    caches: list[Cache] = [NativeCache(facts), NativeCache(facts, 8), NativeCache(facts, 4)]
    if facts.shape is not None:
        caches += [CompressedCache(facts, config.compression or 0) for config in configs]
    context = args.context or min(DEFAULT_CONTEXT, facts.max_tokens or DEFAULT_CONTEXT)
    return {
        "model": args.model or "the bundled model",
        "model_type": facts.model_type,
        "dtype": facts.dtype,
        "weight_bytes": facts.weight_bytes,
        "memory_bytes": memory,
        "trained_context": facts.max_tokens,
        "context": context,
        "caches": [_entry(cache, memory, context, args) for cache in caches],
        "notes": _notes(facts, context),
    }


def _entry(cache: Cache, memory: int, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    entry: dict[str, Any] = {"cache": cache.title}
    if cache.problem is not None:
        return entry | {"problem": cache.problem}
    longest = longest_context(cache, memory)
    held = cache.cache_bytes(context)
    return entry | {
        "longest_context": longest,
        "limited_by": "training" if longest == cache.facts.max_tokens else "memory",
        "bytes_per_1000_tokens": round(1000 * held / context),
        "cache_bytes": held,
        "peak_bytes": cache.peak_bytes(context),
        "loses": cache.loses(context),
        "command": cache.flags(args.model, args.group_size),
    }


def _notes(facts: ModelFacts, context: int) -> list[str]:
    """Sentences on what the table cannot show."""
    notes = []
    if facts.shape is not None and (basis := CompressedCache(facts, 4.0).basis_bytes):
        notes.append(
            f"xKV's peaks count the model's own basis, at most {_gb(basis)}, held once for all "
            "prompts"
        )
    if facts.why_not_xkv is not None:
        notes.append(f"xKV does not help: {facts.why_not_xkv}")
    elif facts.shape is not None:
        native = sum(cache.at(context) for cache in facts.natives)
        share = native / max(native + facts.shape.dense_bytes(context), 1)
        if share >= 0.1:
            notes.append(
                f"xKV leaves {100 * share:.0f} % of the full cache at {context:,} tokens as it is: "
                "sliding windows, recurrent states and other caches of mlx-lm"
            )
        if facts.why_not_layerwise is not None:
            notes.append(
                "prompts stream through all layers and are compressed on the way, so that their "
                f"later parts see approximate rows: {facts.why_not_layerwise}"
            )
    scores = max(NativeCache(facts, bits).score_bytes(context) for bits in (8, 4))
    if scores:
        notes.append(
            f"{_gb(scores)} of the 8 and 4 bit peaks are scores, which mlx-lm's attention over "
            "quantized rows holds for a whole step: --prefill-step-size 256 makes them "
            f"about {_gb(scores * 256 // STEP_TOKENS)}"
        )
    if facts.max_tokens is None:
        notes.append("the config names no trained context")
    elif context > facts.max_tokens:
        notes.append(f"the model was trained for {facts.max_tokens:,} tokens, not {context:,}")
    return notes


def report_lines(report: dict[str, Any]) -> list[str]:
    """The table for people."""
    trained, context = report["trained_context"], report["context"]
    lines = [
        f"{report['model']} ({report['model_type']}, {report['dtype']}): weights "
        f"{_gb(report['weight_bytes'])}, memory {_gb(report['memory_bytes'])}"
        + (f", trained for {trained:,} tokens" if trained else ""),
        "",
        f"{'':10}{'longest':>12}{'':14}{f'at {context:,} tokens':>34}",
        f"{'cache':10}{'context':>12}  {'limited by':12}{'per 1k tokens':>14}{'cache':>12}"
        f"{'peak':>12}  loses",
    ]
    known = [entry for entry in report["caches"] if "problem" not in entry]
    for entry in report["caches"]:
        if "problem" in entry:
            lines.append(f"{entry['cache']:10}{'-':>12}  {entry['problem']}")
            continue
        lines.append(
            f"{entry['cache']:10}{entry['longest_context']:>12,}  {entry['limited_by']:12}"
            f"{entry['bytes_per_1000_tokens'] / 1e6:>11.3f} MB{_gb(entry['cache_bytes']):>12}"
            f"{_gb(entry['peak_bytes']):>12}  {entry['loses']}"
        )
    lines += ["", "peak: weights, cache and workspace, at most, while the prompt is prefilled"]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += ["", *(f"{entry['cache']:10}{entry['command']}" for entry in known)]
    return lines


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3f} GB"
