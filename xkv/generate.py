"""``python -m xkv.generate``: answer a prompt out of a compressed KV cache.

On MLX this is mlx-lm's command with all its flags; ``--backend torch`` has the flags below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from xkv.cli.answer import show_answers, take_built_in_prompt
from xkv.cli.engine import Sampling, load_engine
from xkv.cli.flags import (
    add_compression_flags,
    add_generate_flags,
    check_numbers,
    config_from,
)
from xkv.cli.mlx_flags import check_early
from xkv.cli.openblas import load_mlx
from xkv.cli.terminal import user_errors
from xkv.planning.layer_groups import choose_profile
from xkv.tiny import CHECKPOINT_DIR


def setup_arg_parser() -> argparse.ArgumentParser:
    """The flags of ``--backend torch``; those that mlx-lm has keep its names and meanings."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.generate",
        description="Answer a prompt out of a compressed KV cache. Without arguments: the bundled "
        "model, a built-in long document and a question about it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--prompt", "-p", help="message to answer ('-' reads stdin); a built-in one if left out"
    )
    parser.add_argument("--system-prompt", help="system message for the chat template")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="take the prompt as it is"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    add_generate_flags(parser)
    add_compression_flags(parser)
    sampling = parser.add_argument_group("sampling")
    for field in fields(Sampling):
        if field.name == "seed":
            sampling.add_argument("--seed", type=int, help="PRNG seed")
            continue
        names = ["--" + field.name.replace("_", "-")] + ["-m"] * (field.name == "max_tokens")
        kind = int if isinstance(field.default, int) else float
        sampling.add_argument(*names, type=kind, default=field.default, help="as in mlx-lm")
    parser.add_argument(
        "--prefill-step-size", type=int, default=2048, help="prompt tokens processed at a time"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--backend", default="mlx")
    with user_errors():
        if chooser.parse_known_args(argv)[0].backend == "torch":
            run_on_torch(setup_arg_parser().parse_args(argv))
        else:
            check_early("generate", argv)
            load_mlx().run_generate(argv)


def run_on_torch(args: argparse.Namespace) -> None:
    """Do what the parsed arguments ask.

    Raises:
        InputError: If they cannot be met.
    """
    config = config_from(args)
    sampling = Sampling(**{field.name: vars(args)[field.name] for field in fields(Sampling)})
    check_numbers(args)
    if args.prompt is None:
        take_built_in_prompt(args)
        config = config_from(args)
    escaped = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = sys.stdin.read() if args.prompt == "-" else escaped
    name, trust = args.model or str(CHECKPOINT_DIR), args.trust_remote_code
    profile = None
    if config is not None:
        group_size = vars(args).get("group_size")
        profile = choose_profile(args.grouping, group_size, name, "torch", trust_remote_code=trust)
    engine = load_engine("torch", name, trust_remote_code=trust, kernels=args.kernels)
    if config is not None and profile is not None:
        config = profile.apply(config, engine.identity)
    engine.calibrate_at_first_use(config, args.no_calibration)
    tokens = engine.encode(
        prompt, system_prompt=args.system_prompt, use_chat_template=not args.ignore_chat_template
    )
    show_answers(
        lambda config, on_text, on_progress: engine.generate(
            tokens,
            config,
            sampling,
            prefill_step_size=args.prefill_step_size,
            on_text=on_text,
            on_progress=on_progress,
        ),
        config,
        args.compare,
    )


if __name__ == "__main__":
    main()
