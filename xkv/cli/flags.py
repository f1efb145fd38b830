"""The flags of compression, which every command shares."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from xkv.config import DECODE_TOKENS, Rank, XKVConfig
from xkv.errors import InputError
from xkv.tiny import CHECKPOINT_DIR

KERNELS = ("auto", "on", "off")


def add_compression_flags(parser: argparse.ArgumentParser, has_kernels: bool = True) -> None:
    """Add a group of flags, one for each choice of :class:`xkv.XKVConfig` that a user makes.

    Args:
        parser: Of the command.
        has_kernels: Whether the command decodes, which device kernels are for.
    """
    cache = parser.add_argument_group("compression")
    cache.add_argument(
        "--compression",
        type=float,
        help="target ratio of dense bytes to bytes held; 4 if no ranks are given",
    )
    cache.add_argument(
        "--group-size",
        type=int,
        default=argparse.SUPPRESS,
        help="consecutive layers that share a latent; 0 runs with the full cache "
        f"(default: the model's profile if it has one, else {XKVConfig.group_size})",
    )
    add_grouping_flag(cache)
    cache.add_argument("--rank-k", type=_rank, help="rank of the keys: a number or 'full'")
    cache.add_argument("--rank-v", type=_rank, help="rank of the values: a number or 'full'")
    cache.add_argument(
        "--latent-bits",
        type=_latent_bits,
        default=XKVConfig.latent_bits,
        help="'auto' stores columns in 2 to 8 bits by what they are worth; 16 is the paper's form "
        f"(default: {XKVConfig.latent_bits})",
    )
    cache.add_argument(
        "--basis",
        choices=["auto", "calibrated", "prompt"],
        default=XKVConfig.basis,
        help="the model's own basis, calibrated once (auto: where there is one), or the paper's "
        f"form, a joint SVD of each prompt (default: {XKVConfig.basis})",
    )
    cache.add_argument(
        "--max-key-rank", type=int, help="columns of keys that a group keeps at most"
    )
    add_calibration_flag(cache)
    for name, text in (
        ("sinks", "first tokens that stay dense"),
        ("window", "last tokens that stay dense"),
        ("max-tail", "tokens after the window that stay dense before they are folded in"),
        ("budget", "stored rows that a decode step attends to"),
    ):
        default = getattr(XKVConfig, name.replace("-", "_"))
        text += f" (default: {'as many as pay' if default is None else default})"
        cache.add_argument(f"--{name}", type=int, default=default, help=text)
    cache.add_argument(
        "--kept-share",
        type=float,
        default=XKVConfig.kept_share,
        help="share of the bytes held for recent rows, which stay at hand in 8 bits "
        f"(default: {XKVConfig.kept_share})",
    )
    cache.add_argument(
        "--attention",
        choices=["auto", "exact"],
        default=XKVConfig.attention,
        help="attend to the stored rows that matter most, or to every one "
        f"(default: {XKVConfig.attention})",
    )
    if has_kernels:
        cache.add_argument(
            "--kernels", choices=KERNELS, default="auto", help="use device kernels (default: auto)"
        )


def add_calibration_flag(parser: Any) -> None:
    """Add ``--no-calibration``."""
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="do not calibrate a model at its first use, which takes minutes, once",
    )


def add_grouping_flag(parser: argparse._ActionsContainer) -> None:
    """Add the flag that says which layers share a latent."""
    parser.add_argument(
        "--grouping",
        metavar="{consecutive,cka,FILE}",
        help="layers that share a latent: consecutive ones; those that are alike, measured first; "
        "or a file that xkv.calibrate wrote (default: the model's profile if it has one, else "
        "consecutive)",
    )


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only ``python -m xkv.generate`` has."""
    parser.add_argument(
        "--backend", choices=["mlx", "torch"], default="mlx", help="framework (default: mlx)"
    )
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="answer out of the full cache too (default: with the built-in prompt)",
    )


def check_flags(args: argparse.Namespace, writes_file: bool = False) -> XKVConfig | None:
    """Check the flags that mlx-lm's commands share, and fill in the bundled model.

    Args:
        args: What was parsed.
        writes_file: Whether ``--prompt-cache-file`` is written, not read.

    Returns:
        The configuration that the flags ask for; None with ``--group-size 0``.

    Raises:
        InputError: If the flags contradict each other.
    """
    # mlx-lm takes the model from the prompt cache's file where none is given
    is_in_file = not writes_file and vars(args).get("prompt_cache_file") is not None
    if args.model is None and not is_in_file:
        args.model = str(CHECKPOINT_DIR)
    config = config_from(args)
    check_numbers(args)
    if is_in_file and vars(args).get("draft_model") is not None:
        raise InputError("--draft-model needs the whole prompt, not --prompt-cache-file")
    return config


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that no generation can have.

    Raises:
        InputError: Naming the flag.
    """
    max_tokens, step_size = (vars(args).get(name) for name in ("max_tokens", "prefill_step_size"))
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens} must be at least 1")
    if step_size is not None and step_size <= DECODE_TOKENS:
        raise InputError(
            f"--prefill-step-size {step_size} must be above {DECODE_TOKENS}: "
            "smaller calls count as decoding"
        )


def _compression_defaults() -> dict[str, object]:
    """The flags of :func:`add_compression_flags` that are fields of the configuration."""
    parser = argparse.ArgumentParser(add_help=False)
    add_compression_flags(parser)
    fields_ = {field.name for field in fields(XKVConfig)}
    return {a.dest: parser.get_default(a.dest) for a in parser._actions if a.dest in fields_}


def has_compression_flags(args: argparse.Namespace) -> bool:
    """Whether any flag of :func:`add_compression_flags` was given a value of its own."""
    given = vars(args)
    return given.get("grouping") is not None or any(
        name in given and given[name] != default
        for name, default in _compression_defaults().items()
    )


def config_from(args: argparse.Namespace) -> XKVConfig | None:
    """The configuration that the flags ask for; None with ``--group-size 0``.

    Args:
        args: With the flags of :func:`add_compression_flags`.

    Raises:
        InputError: If the flags contradict each other.
    """
    chosen = vars(args)
    names = set(_compression_defaults()) & set(chosen)
    group_size, grouping = vars(args).get("group_size"), args.grouping
    if group_size is not None and grouping not in (None, "consecutive", "cka"):
        raise InputError(
            "--group-size and --grouping FILE exclude each other: the file says which layers form "
            "a group"
        )
    if group_size == 0:
        given = [
            f"--{x.replace('_', '-')}"
            for x in ("compression", "rank_k", "rank_v", "grouping")
            if vars(args)[x]
        ]
        if given:
            raise InputError(
                f"--group-size 0 runs the full cache, which {', '.join(given)} contradicts"
            )
        return None
    for name in ("kv_bits", "max_kv_size"):
        if vars(args).get(name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} changes mlx-lm's own cache, which xKV replaces: leave "
                "it out, or run with --group-size 0"
            )
    return XKVConfig(**{name: chosen[name] for name in names})


def _latent_bits(text: str) -> str | int:
    if text not in ("auto", "16"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 16 nor 'auto'")
    return text if text == "auto" else 16


def _rank(text: str) -> Rank:
    if text == "full":
        return "full"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'full'") from None
