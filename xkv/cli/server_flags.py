"""The flags that only ``python -m xkv.server`` has."""

from __future__ import annotations

import argparse
import os
from decimal import Decimal, InvalidOperation

from xkv.errors import InputError

API_KEY = "XKV_API_KEY"
"""The environment variable for ``--api-key``; the command line is in every list of processes."""

DISK_BYTES = 10_000_000_000
"""Of ``--prompt-cache-disk-bytes``, if it is left out."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def byte_count(text: str) -> int:
    """Bytes of a flag, as mlx-lm's own are written too: ``500MB``, ``1.5 G``, ``4096``."""
    number = text.upper().removesuffix("B").rstrip("KMGT")
    unit = text.upper().removesuffix("B")[len(number) :]
    try:
        return int(Decimal(number) * _UNITS[unit])
    except (InvalidOperation, KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bytes, as 4096, 500MB or 1.5GB"
        ) from None


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags: who may ask the server, for what, and how much at a time; what is kept on disk."""
    _add_disk_flags(parser)
    guard = parser.add_argument_group("guard")
    guard.add_argument(
        "--api-key",
        help="key that requests have to give, as 'Authorization: Bearer KEY' or 'x-api-key: KEY' "
        f"(default: the environment variable {API_KEY}, else none)",
    )
    guard.add_argument(
        "--allow-models",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models, adapters and draft models that a request may name beside those of the "
        "command line (default: none)",
    )
    guard.add_argument(
        "--max-body-bytes",
        type=byte_count,
        default=32_000_000,
        help="largest body of a request (default: 32000000)",
    )
    guard.add_argument(
        "--request-timeout",
        type=float,
        default=60.0,
        help="seconds in which a request has to arrive; answers take as long as they take "
        "(default: 60)",
    )
    guard.add_argument(
        "--max-connections",
        type=int,
        default=64,
        help="clients that are served or wait at a time; others are answered 503 (default: 64)",
    )


def _add_disk_flags(parser: argparse.ArgumentParser) -> None:
    disk = parser.add_argument_group("conversations on disk")
    disk.add_argument(
        "--prompt-cache-dir",
        metavar="DIR",
        help="folder in which conversations survive the server (default: none)",
    )
    disk.add_argument(
        "--prompt-cache-disk-bytes",
        type=byte_count,
        metavar="N",
        help=f"most bytes of all files in it, as 20GB (default: {DISK_BYTES})",
    )


def check_server_flags(args: argparse.Namespace) -> None:
    """Check the flags of :func:`add_server_flags`, and read the key from the environment.

    Raises:
        InputError: Naming the flag.
    """
    for name in ("max_body_bytes", "max_connections"):
        if vars(args)[name] < 1:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {vars(args)[name]} must be at least 1")
    if not 0 < args.request_timeout < float("inf"):
        raise InputError(f"--request-timeout {args.request_timeout:g} must be above 0 seconds")
    if args.prompt_cache_disk_bytes is None:
        args.prompt_cache_disk_bytes = DISK_BYTES
    elif args.prompt_cache_dir is None:
        raise InputError(
            "--prompt-cache-disk-bytes needs a folder: give it with --prompt-cache-dir"
        )
    if args.prompt_cache_dir == "":
        raise InputError("--prompt-cache-dir must be the name of a folder")
    if args.prompt_cache_disk_bytes < 1:
        raise InputError(
            f"--prompt-cache-disk-bytes {args.prompt_cache_disk_bytes} must be at least 1"
        )
    if args.api_key is None:
        args.api_key = os.environ.get(API_KEY)
    if args.api_key is not None and not _is_word(args.api_key):
        raise InputError(
            f"the API key must be printable ASCII without spaces: change --api-key or {API_KEY}"
        )


def _is_word(key: str) -> bool:
    """Whether a key arrives as it is in a header; an empty one would let everybody in."""
    return key.isascii() and key.isprintable() and len(key.split()) == 1 and key == key.strip()
