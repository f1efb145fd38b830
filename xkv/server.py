"""``python -m xkv.server``: mlx-lm's OpenAI-compatible server over compressed caches."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.cli.mlx_flags import check_early
from xkv.cli.openblas import load_mlx
from xkv.cli.terminal import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server with its flags and ours."""
    with user_errors():
        check_early("server", argv)
        load_mlx().run_server(argv)


if __name__ == "__main__":
    main()
