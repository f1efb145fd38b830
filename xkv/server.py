"""``python -m xkv.server``: mlx-lm's OpenAI-compatible server over compressed caches."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.backend import load_backend_module
from xkv.command_line import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server with its flags and ours."""
    with user_errors():
        load_backend_module("mlx").run_server(argv)


if __name__ == "__main__":
    main()
