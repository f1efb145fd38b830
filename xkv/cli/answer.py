"""What ``python -m xkv.generate`` asks and prints, whichever backend answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from xkv.cli.engine import Generation, Progress
from xkv.cli.flags import has_compression_flags
from xkv.cli.terminal import ProgressBars, size_text
from xkv.config import XKVConfig
from xkv.tiny import make_document

BUILT_IN_SEED = 2024
BUILT_IN_TOKENS = 3500
BUILT_IN_COMPRESSION = 16.0


def take_built_in_prompt(args: argparse.Namespace) -> None:
    """Ask about a long document, and say on stdout what; beside the full cache, at a high ratio.

    Args:
        args: What was parsed, without a prompt; flags that were given are left as they are.
    """
    document = make_document(BUILT_IN_SEED, BUILT_IN_TOKENS)
    fact = document.facts[len(document.facts) // 3]
    args.prompt = f"{document.text} {fact.question}"
    if not has_compression_flags(args):
        args.compression = BUILT_IN_COMPRESSION
    if args.compare is None:
        args.compare = vars(args).get("prompt_cache_file") is None
    print(
        f"The built-in document has about {BUILT_IN_TOKENS} tokens; it begins:\n"
        f"  {document.text[:140].rsplit(' ', 1)[0]} ...\n"
        f"Question: {fact.question}"
    )


def show_answers(
    answer: Callable[[XKVConfig | None, Callable[[str], None], Progress], Generation],
    config: XKVConfig | None,
    compare: bool,
) -> Generation:
    """Print an answer and its cost as they come, and with ``compare`` the full cache's beside it.

    Args:
        answer: Called with a configuration, what to call with text, and with progress.
        config: None answers with the full cache.
        compare: Answer with the full cache too.

    Returns:
        The first answer.
    """

    is_compared = compare and config is not None

    def show(config: XKVConfig | None) -> Generation:
        if is_compared:
            print(f"--- {'full cache' if config is None else 'xKV'}")
        with ProgressBars() as bars:
            result = answer(config, bars.write, bars.update)
        print()
        print(report(result))
        return result

    mine = show(config)
    if is_compared:
        full = show(None)
        same = "the same" if mine.tokens == full.tokens else "different"
        ratio = full.allocated_bytes / mine.allocated_bytes
        print(f"--- answers are {same}; xKV holds {ratio:.2f} x less memory")
    return mine


def drafts_text(n_drafted: int, n_taken: int) -> str:
    """One line on what became of a draft model's tokens."""
    return f"Drafts: {n_taken} of {n_drafted} tokens accepted ({n_taken / max(n_drafted, 1):.1%})"


def report(result: Generation) -> str:
    """The last lines of a run, like mlx-lm's, with the cache's memory."""
    prefill_tps = result.n_prompt / max(result.prefill_seconds, 1e-9)
    lines = [
        "=" * 10,
        f"Prompt: {result.n_prompt} tokens, {prefill_tps:.3f} tokens-per-sec",
        f"Generation: {len(result.tokens)} tokens, {result.decode_tps:.3f} tokens-per-sec",
    ]
    if result.n_drafted is not None:
        lines.append(drafts_text(result.n_drafted, result.n_taken))
    if result.detail is not None:
        what = "Compression" if result.basis_bytes else "Factorization"
        lines.append(f"{what}: {result.factorize_seconds:.3f} s ({result.detail})")
    if result.peak_bytes is not None:
        lines.append(f"Peak memory: {size_text(result.peak_bytes)}")
    ratio = result.dense_bytes / max(result.allocated_bytes, 1)
    dense, allocated, held = map(
        size_text, (result.dense_bytes, result.allocated_bytes, result.held_bytes)
    )
    lines.append(
        f"KV cache: {dense} dense, {allocated} held ({ratio:.2f} x), "
        f"{held} by the sizes of its arrays"
    )
    if result.basis_bytes:
        lines.append(
            f"Model's basis: {size_text(result.basis_bytes)}, beside the weights, for all prompts"
        )
    if result.notice:
        lines.append(f"Note: {result.notice}")
    return "\n".join(lines)
