"""What benchmarks of the server's parts share: their flags, and a model that is enabled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx_lm

import xkv
from xkv.backends.mlx_metal.cli.commands import Command
from xkv.backends.mlx_metal.model.calibration import calibrate_enabled
from xkv.backends.mlx_metal.model.enable import identity_of
from xkv.config import XKVConfig
from xkv.planning.layer_groups import choose_profile
from xkv.tiny import CHECKPOINT_DIR


def bench_parser(doc: str, tokens: int, help_tokens: str) -> argparse.ArgumentParser:
    """Flags of a benchmark with this docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="a model for mlx-lm; the bundled one if left out")
    parser.add_argument("--tokens", type=int, default=tokens, help=help_tokens)
    parser.add_argument("--compression", type=float, default=8)
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    return parser


def enabled_model(args: argparse.Namespace) -> tuple[Any, Any, XKVConfig]:
    """The model of the flags, as the commands enable it; its tokenizer and configuration."""
    path, config = args.model or str(CHECKPOINT_DIR), XKVConfig(compression=args.compression)
    model, tokenizer, *_ = mlx_lm.load(path)
    Command().speed_up(model)
    profile = choose_profile(None, None, path, "mlx")
    if profile is not None:
        config = profile.apply(config, identity_of(model, config))
    xkv.enable(model, config)
    calibrate_enabled(model, tokenizer, config)
    return model, tokenizer, config
