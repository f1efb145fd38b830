"""The longest context that fits into memory, and what decode takes, by kind of KV cache."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.loading import load_backend_module
from xkv.planning.chips import CHIPS, LENGTHS, Chip, milliseconds
from xkv.planning.decode_cost import (
    FULL_LAUNCHES,
    LayerShape,
    Parts,
    StepWork,
    full_cache,
    planned_bits,
    working_set,
)
from xkv.planning.footprint import (
    STEP_TOKENS,
    Cache,
    CompressedCache,
    ModelFacts,
    NativeCache,
    longest_context,
)
from xkv.tiny import CHECKPOINT_DIR

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
    config = XKVConfig(args.group_size)
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
        "decode": decode_times(facts, [x for x in caches if isinstance(x, CompressedCache)]),
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


def decode_times(facts: ModelFacts, caches: Sequence[CompressedCache]) -> list[dict[str, Any]]:
    """Milliseconds a token on named chips: weights and cache read, products, launches.

    Args:
        facts: The model, all of whose weights count as read.
        caches: xKV's, to stand beside the full cache.

    Returns:
        An entry for each chip and length up to the trained context, empty where nothing is known:
        without a compressed cache, or with values that stay dense.
    """
    if not caches or any(group.has_dense_values for group in caches[0].shape.groups):
        return []
    limit = facts.max_tokens or LENGTHS[-1]
    lengths = [n for n in LENGTHS if n <= limit] or [limit]
    return [
        {
            "chip": chip.name,
            "tokens": n_tokens,
            "ms": {"full": _step_ms(facts, chip, n_tokens, None)}
            | {cache.title: _step_ms(facts, chip, n_tokens, cache) for cache in caches},
            "source": chip.source,
        }
        for chip in CHIPS
        for n_tokens in lengths
    ]


def _step_ms(facts: ModelFacts, chip: Chip, n_tokens: int, cache: CompressedCache | None) -> float:
    """A decode step of all layers with xKV's cache, or with the full one."""
    shape = facts.shape
    assert shape is not None
    bits = planned_bits(shape, cache.config, n_tokens) if cache else None
    # caches that stay as they are: windows, states, and layers in no group
    native = sum(x.at(n_tokens) for x in facts.natives) + n_tokens * shape.dense_row_bytes
    others = {"": StepWork(native, 0, FULL_LAUNCHES * len(facts.natives))}
    ms = milliseconds(chip, others, 1, facts.weight_bytes)
    for number, group in enumerate(shape.groups):
        layer = LayerShape(max(facts.n_heads, group.n_kv_heads), group, shape.item_bytes)
        parts: Parts = full_cache(layer, n_tokens)
        if cache is not None and bits is not None:
            keys, values = bits[number]
            layer = replace(layer, key_bits=keys, value_bits=values)
            parts = working_set(layer, cache.config, n_tokens, chip.is_metal)
        ms += milliseconds(chip, parts, group.n_layers)
    return ms


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
    return lines + decode_lines(report["decode"])


def decode_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The table of milliseconds a token."""
    if not entries:
        return []
    names = list(entries[0]["ms"])
    lines = [
        "",
        "milliseconds a token in decode: arithmetic, not measured (weights included)",
        f"{'chip':10}{'tokens':>9}" + "".join(f"{name:>11}" for name in names),
    ]
    for entry in entries:
        ms = "".join(f"{entry['ms'][name]:>11.1f}" for name in names)
        lines.append(f"{entry['chip']:10}{entry['tokens']:>9,}{ms}")
    return lines


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3f} GB"
