"""``python -m xkv.inspect``: what a prompt's cache looks like, and what compression makes of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from xkv.checks.page import write_page
from xkv.checks.plots import new_figure, write_plots
from xkv.cli.first_use import calibrate_at_first_use
from xkv.cli.flags import add_compression_flags, config_from
from xkv.cli.terminal import user_errors
from xkv.errors import InputError
from xkv.evaluation.inspection import STEPS, inspect, report_lines
from xkv.planning.language_model import load_language_model
from xkv.planning.layer_groups import choose_profile, read_prompt
from xkv.tiny import CHECKPOINT_DIR

LONGEST_WORD = 120
"""Characters of an argument that the page shows."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.inspect",
        description="Plot a prompt's cache: singular spectra, similarity of layers, the error of "
        "each layer once it is compressed, the bits that the latents are held in, and which rows "
        "are rebuilt while the model decodes; all of it on one page, index.html.",
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--prompt",
        "-p",
        help="text file, or text, to look at ('-' reads stdin); a built-in text if left out",
    )
    parser.add_argument(
        "--backend", choices=["mlx", "torch"], default="mlx", help="framework (default: mlx)"
    )
    parser.add_argument(
        "--out",
        default="xkv-inspection",
        help="folder of the page, the plots and the numbers (default: xkv-inspection)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help=f"tokens to decode, to see which rows are rebuilt (default: {STEPS})",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    add_compression_flags(parser, has_kernels=False)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        run(args, command_text(sys.argv[1:] if argv is None else argv))


def command_text(argv: Sequence[str]) -> str:
    """The command line, a long prompt cut short."""
    words = (x if len(x) <= LONGEST_WORD else f"{x[: LONGEST_WORD - 1]}…" for x in argv)
    return shlex.join(["python", "-m", "xkv.inspect", *words])


def run(args: argparse.Namespace, command: str) -> None:
    """Do what the parsed arguments ask.

    Args:
        args: Of :func:`setup_arg_parser`.
        command: As it was typed.

    Raises:
        InputError: If they cannot be met.
    """
    config = config_from(args)
    if config is None:
        raise InputError("--group-size 0 runs the full cache, which has nothing to inspect")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps} must be at least 1")
    new_figure(1, 1)  # a missing matplotlib is told before minutes of work
    text = read_prompt(args.prompt)
    name, trust = args.model or str(CHECKPOINT_DIR), args.trust_remote_code
    group_size = vars(args).get("group_size")
    profile = choose_profile(args.grouping, group_size, name, args.backend, trust_remote_code=trust)
    model = load_language_model(args.backend, name, trust_remote_code=trust)
    if profile is not None:
        config = profile.apply(config, model.identity)
    chosen = config
    calibrate_at_first_use(
        lambda: model.subject(chosen), model.tokenizer, chosen, args.no_calibration
    )
    report = inspect(model, text, config, args.steps)
    report |= {"name": args.model or "the bundled model", "command": command}
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "inspect.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    names = [write_page(folder, report), "inspect.json", *write_plots(folder, report)]
    print("\n".join(report_lines(report)))
    print(f"{folder}: {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    main()
