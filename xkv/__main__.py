"""``xkv COMMAND``, the same as ``python -m xkv.COMMAND``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "generate": "answer a prompt out of a compressed cache",
    "chat": "talk to a model",
    "server": "serve the APIs of OpenAI and Anthropic",
    "cache_prompt": "process a long prompt once and keep its cache in a file",
    "evaluate": "score compressed caches on long-context tasks",
    "calibrate": "find the layers that are alike, and keep it as a model's profile",
    "inspect": "plot spectra, similarity of layers, errors and bits of a compressed cache",
    "parity": "whether both backends compute the same here",
    "plan": "what fits into this machine's memory",
    "doctor": "which kernels work here, and how fast",
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        importlib.import_module(f"xkv.{name}").main(sys.argv[2:])
        return
    width = max(map(len, COMMANDS))
    lines = ["usage: xkv COMMAND [--help]", ""]
    lines += [f"  {command:<{width}}  {text}" for command, text in COMMANDS.items()]
    is_help = name in ("", "__help", "_h")
    if not is_help:
        lines.insert(0, f"error: there is no command {sys.argv[1]!r}")
    print("\n".join(lines), file=sys.stdout if is_help else sys.stderr)
    sys.exit(0 if is_help else 2)


if __name__ == "__main__":
    main()
