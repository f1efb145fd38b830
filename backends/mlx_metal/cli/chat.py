"""What xkv adds to mlx-lm's chat and prompt caching."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.cli.commands import Command, run
from xkv.backends.mlx_metal.model.memory import cache_text
from xkv.backends.mlx_metal.model.snapshot import Snapshot
from xkv.cli.terminal import ProgressBars


def run_chat(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's chat: ``q`` quits, ``r`` resets, Ctrl-C takes back the message it interrupts."""
    with contextlib.suppress(ImportError):
        # without it a terminal cuts a pasted line off after 4096 characters
        import readline  # noqa: F401
    with contextlib.suppress(EOFError):
        run("chat", argv, command=Chat())


def run_cache_prompt(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's prompt caching; the cache in the file is the compressed one."""
    run("cache_prompt", argv, command=CachePrompt())


class Chat(Command):
    """mlx-lm's chat, whose turns can be interrupted."""

    def replacements(self, module: Any) -> dict[str, Any]:
        stream_generate = _interruptible(module.stream_generate)
        return {**super().replacements(module), "stream_generate": stream_generate}


class CachePrompt(Command):
    """mlx-lm's prompt caching."""

    writes_file = True


def _interruptible(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A turn that shows its progress, and that Ctrl-C undoes as a whole."""

    def stream_generate(
        model: Any, tokenizer: Any, prompt: Any, *, prompt_cache: list[Any], **kwargs: Any
    ) -> Iterator[Any]:
        before = Snapshot(prompt_cache)
        try:
            with ProgressBars() as bars:
                for response in original(
                    model,
                    tokenizer,
                    prompt,
                    prompt_cache=prompt_cache,
                    prompt_progress_callback=lambda done, total: bars.update(
                        "prefill", done, total
                    ),
                    **kwargs,
                ):
                    bars.close()
                    yield response
        except KeyboardInterrupt:
            before.restore()
            print(
                "\ninterrupted: this message is forgotten, the conversation before it is kept",
                file=sys.stderr,
            )
            return
        if mx.distributed.init().rank() == 0:
            print(f"\n{cache_text(prompt_cache)}", end="", file=sys.stderr)

    return stream_generate
