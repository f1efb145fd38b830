"""``python -m xkv.chat``: mlx-lm's chat, whose memory stays where it was asked to stay."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.cli.mlx_flags import check_early
from xkv.cli.openblas import load_mlx
from xkv.cli.terminal import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's chat with its flags and ours."""
    with user_errors():
        check_early("chat", argv)
        load_mlx().run_chat(argv)


if __name__ == "__main__":
    main()
