"""``python -m xkv.cache_prompt``: process a prompt once, keep its compressed cache in a file."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.backend import load_backend_module
from xkv.command_line import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's prompt caching with its flags and ours."""
    with user_errors():
        load_backend_module("mlx").run_cache_prompt(argv)


if __name__ == "__main__":
    main()
