"""``python -m xkv.server``: mlx-lm's OpenAI-compatible server over compressed caches."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.cli.flags import check_early
from xkv.cli.terminal import user_errors
from xkv.ops.loading import load_backend_module


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server with its flags and ours."""
    with user_errors():
        check_early(argv)
        load_backend_module("mlx").run_server(argv)


if __name__ == "__main__":
    main()
