"""mlx-lm's server with what xkv puts in the place of its parts."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from xkv.backends.mlx_metal.cli.commands import Command, run
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enable import disable
from xkv.backends.mlx_metal.model.enabled import enabled_state
from xkv.backends.mlx_metal.server.disk_cache import prompt_cache
from xkv.backends.mlx_metal.server.draft_counts import DraftCounts
from xkv.backends.mlx_metal.server.errors import RequestError
from xkv.backends.mlx_metal.server.generator import Generator
from xkv.backends.mlx_metal.server.listening import is_loopback, server_class
from xkv.backends.mlx_metal.server.message_tokens import message_tokens
from xkv.backends.mlx_metal.server.messages import MessagesHandler
from xkv.cli.server_flags import API_KEY
from xkv.errors import InputError

mlx_server = borrowed.module("mlx_lm.server")


def run_server(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server over compressed caches."""
    run("server", argv, command=Server())


class Server(Command):
    """mlx-lm's server, which keeps to its memory and answers every request."""

    def __init__(self) -> None:
        super().__init__()
        self.drafts = DraftCounts()
        self.provider: Any = None
        """mlx-lm's, which loads models."""

    def loaded(self) -> Sequence[Any]:
        """The model and the draft model that are loaded; None for none."""
        return self.provider.model, self.provider.draft_model

    def take(self, args: argparse.Namespace) -> None:
        super().take(args)
        # mlx-lm's own call does nothing when there is a handler already
        logging.basicConfig(
            level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s", force=True
        )

    def replacements(self, module: Any) -> dict[str, Any]:
        return {
            **super().replacements(module),
            "LRUPromptCache": lambda size: prompt_cache(size, self.args, self.loaded),
            "ModelProvider": lambda args: Models(args, self),
            "ResponseGenerator": Generator,
            "_run_http_server": _serving(module._run_http_server),
            "make_sampler": flat_tokens(module.make_sampler),
            "stream_generate": self.drafts.counting(module.stream_generate),
        }


def _serving(original: Callable[..., None]) -> Callable[..., None]:
    """``_run_http_server`` with our handler, once the model is loaded."""

    def _run_http_server(host: str, port: int, generator: Generator) -> None:
        try:
            generator.wait_until_loaded()
            args = generator.cli_args
            if args.api_key is None and not is_loopback(host):
                print(
                    f"Warning: whoever reaches {host}:{port} may ask this server: give it an "
                    f"--api-key, or {API_KEY}",
                    file=sys.stderr,
                )
            classes = {
                "server_class": server_class(args.max_connections, generator.stop_and_join),
                "handler_class": MessagesHandler,
            }
            original(host, port, generator, **classes)
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error}; try another --port"
            ) from error
        finally:
            generator.stop_and_join()

    return _run_http_server


def flat_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """``make_sampler`` that takes lists among XTC's tokens, as mlx-lm up to 0.31 gives them."""

    def make_sampler(*args: Any, xtc_special_tokens: Sequence[Any], **kwargs: Any) -> Any:
        lists = (x if isinstance(x, list) else [x] for x in xtc_special_tokens)
        return original(*args, xtc_special_tokens=[x for y in lists for x in y], **kwargs)

    return make_sampler


class Models(mlx_server.ModelProvider):  # type: ignore[name-defined]
    """mlx-lm's models, of which ours lets go together with it."""

    is_batchable: bool

    def __init__(self, args: argparse.Namespace, command: Server) -> None:
        super().__init__(args)
        self._command = command
        self.drafts = command.drafts
        command.provider = self

    def _load(self, *args: Any) -> None:
        while self._command.models:
            disable(self._command.models.pop())
        self._command.tokenizer = None
        # before the next one is loaded; mlx-lm up to 0.31 leaves it to Python's collector
        self.model_key = self.model = self.tokenizer = self.draft_model = None
        gc.collect()
        super()._load(*args)
        enabled = enabled_state(self.model)
        if enabled is not None:
            enabled.boundaries = message_tokens(self.tokenizer)
        if enabled is not None and self.is_batchable and enabled.why_not_batched is not None:
            logging.info("requests are served one at a time: %s", enabled.why_not_batched)
            self.is_batchable = False

    def load(self, model_path: str, *args: Any) -> Any:
        try:
            return super().load(model_path, *args)
        except Exception as error:
            raise RequestError(404, str(error), "model_not_found") from error
