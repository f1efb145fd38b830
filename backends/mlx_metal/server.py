"""What xkv adds to mlx-lm's server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.commands import Command, run


def run_server(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server over compressed caches."""
    run("server", argv, command=Server())


class Server(Command):
    """mlx-lm's server.  (commands.run takes a Command object now: override add_flags, take, replacements.)"""

    def replacements(self, module: Any) -> dict[str, Any]:
        return super().replacements(module)
