"""``python -m xkv.calibrate``: which of a model's layers are alike, measured on one prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.calibration import calibrate, n_groups_of, read_prompt
from xkv.planning.language_model import load_language_model
from xkv.planning.profile import profile_path
from xkv.tiny import CHECKPOINT_DIR


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.calibrate",
        description="Measure which layers' keys and values are alike, and write the best groups "
        "and their shares of the bytes as a profile, which the other commands load.",
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--prompt",
        "-p",
        help="text file, or text, to measure on ('-' reads stdin); a built-in text if left out",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--group-size",
        type=int,
        default=XKVConfig.group_size,
        help="make as many groups as groups of this size would be "
        f"(default: {XKVConfig.group_size})",
    )
    sizes.add_argument("--groups", type=int, help="groups to make")
    parser.add_argument(
        "--backend", choices=["mlx", "torch"], default="mlx", help="framework (default: mlx)"
    )
    parser.add_argument(
        "--out", help="file to write; in the model's directory, or the user's cache, if left out"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        for flag, number in (("--groups", args.groups), ("--group-size", args.group_size)):
            if number is not None and number < 1:
                raise InputError(f"{flag} {number} must be at least 1")
        text = read_prompt(args.prompt)
        name = args.model or str(CHECKPOINT_DIR)
        model = load_language_model(args.backend, name, trust_remote_code=args.trust_remote_code)
        n_groups = args.groups
        if n_groups is None:
            n_groups = n_groups_of(args.group_size, len(model.ropes))
        profile = calibrate(model, text, n_groups)
        path = args.out or profile_path(name)
        profile.save(path)
        print(f"{profile.model}\n{profile}\n{profile.note}")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
