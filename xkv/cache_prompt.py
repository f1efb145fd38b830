"""``python -m xkv.cache_prompt``: process a prompt once, keep its compressed cache in a file."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.cli.mlx_flags import check_early
from xkv.cli.openblas import load_mlx
from xkv.cli.terminal import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's prompt caching with its flags and ours."""
    with user_errors():
        check_early("cache_prompt", argv, writes_file=True)
        load_mlx().run_cache_prompt(argv)


if __name__ == "__main__":
    main()
