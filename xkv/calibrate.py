"""``python -m xkv.calibrate``: a basis of the model's own, measured once on mixed texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xkv.cli.engine import load_engine
from xkv.cli.first_use import calibrate
from xkv.cli.openblas import load_mlx
from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.language_model import load_language_model
from xkv.planning.layer_groups import measure_groups, n_groups_of, read_prompt
from xkv.planning.profile import find_profile, profile_path
from xkv.tiny import CHECKPOINT_DIR


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.calibrate",
        description="Measure a basis of the model's own for keys and values, which every prompt is "
        "stored in from then on. Other commands do it by themselves at a model's first use.",
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="texts of yours, besides ours"
    )
    parser.add_argument("--again", action="store_true", help="measure although there is one")
    parser.add_argument(
        "--cka",
        action="store_true",
        help="first measure which layers' keys and values are alike, and write the best groups as "
        "the model's profile; other groups are the profile's, or consecutive",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        help="text file, or text, for --cka ('-' reads stdin); a built-in text if left out",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        help="layers that share a basis; with --cka, as many groups as groups of this size would "
        f"be (default: {XKVConfig.group_size})",
    )
    parser.add_argument(
        "--backend", choices=["mlx", "torch"], default="mlx", help="framework (default: mlx)"
    )
    parser.add_argument("--out", help="file to write instead of one in the user's cache")
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        if args.group_size is not None and args.group_size < 1:
            raise InputError(f"--group-size {args.group_size} must be at least 1")
        name = args.model or str(CHECKPOINT_DIR)
        config = XKVConfig(args.group_size or XKVConfig.group_size)
        if args.cka:
            config = replace(config, groups=_measured_groups(args, name, config.group_size))
        elif args.group_size is None and (profile := find_profile(name)) is not None:
            config = replace(config, groups=profile.groups)
        if args.backend == "mlx":
            load_mlx()
        engine = load_engine(args.backend, name, trust_remote_code=args.trust_remote_code)
        if (text := engine.speed_up()) is not None:
            print(text, file=sys.stderr)
        out = None if args.out is None else Path(args.out)
        done = calibrate(
            engine.subject(config), engine.tokenizer, args.text, args.again or bool(args.text), out
        )
        if out is not None and done.problem is not None:
            raise InputError(done.problem)
        print(f"{len(done.basis.groups)} groups of layers, calibration {done.basis.uid[:12]}")


def _measured_groups(
    args: argparse.Namespace, name: str, group_size: int
) -> tuple[tuple[int, ...], ...]:
    """Groups of layers that are alike, kept as the model's profile."""
    text = read_prompt(args.prompt)
    model = load_language_model(args.backend, name, trust_remote_code=args.trust_remote_code)
    profile = measure_groups(model, text, n_groups_of(group_size, len(model.ropes)))
    path = profile_path(name)
    profile.save(path)
    print(f"{profile.model}\n{profile}\n{profile.note}")
    print(f"wrote {path}", file=sys.stderr)
    return profile.groups


if __name__ == "__main__":
    main()
