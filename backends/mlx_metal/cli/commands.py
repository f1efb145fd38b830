"""mlx-lm's own command lines with our cache underneath and a few flags more."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.cli.engine import load_errors
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.calibration import calibrate_enabled
from xkv.backends.mlx_metal.model.enable import disable, enable, identity_of
from xkv.backends.mlx_metal.model.enabled import enabled_state, lowrank_cache
from xkv.backends.mlx_metal.model.files import load_prompt_cache, save_prompt_cache
from xkv.backends.mlx_metal.model.float32 import speed_up
from xkv.cli.flags import check_flags, has_compression_flags
from xkv.cli.mlx_flags import argparse_with, parser_class
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.layer_groups import choose_profile
from xkv.planning.profile import Profile


class Command:
    """One run of an mlx-lm command; subclasses add flags and replace more of it."""

    writes_file = False
    """Whether ``--prompt-cache-file`` is written, not read."""

    def __init__(self) -> None:
        self.name = ""
        self.args = argparse.Namespace()
        """What was parsed; set when mlx-lm's ``main`` has done so."""
        self.config: XKVConfig | None = None
        """The compression asked for; None for the full cache."""
        self.grouping: str | None = None
        """What ``--grouping`` says; a prompt cache from a file keeps its own groups."""
        self.models: list[Any] = []
        """Models that were loaded and enabled."""
        self.tokenizer: Any = None
        """Of the model; a draft model is loaded after it."""

    def take(self, args: argparse.Namespace) -> None:
        """Check the parsed flags.

        Raises:
            InputError: If they cannot be met.
        """
        self.args = args
        self.config = check_flags(args, self.writes_file)
        self.grouping = args.grouping
        prompt = vars(args).get("prompt")
        if prompt == "-":
            prompt = sys.stdin.read()
            sys.stdin = io.StringIO(prompt)
        if prompt is not None and not prompt.strip():
            raise InputError("the prompt is empty: give some text with --prompt")

    def replacements(self, module: Any) -> dict[str, Any]:
        """Globals of mlx-lm's module that are others while it runs."""
        parser = parser_class(self.name, self.take)
        names: dict[str, Any] = {"argparse": argparse_with(parser)}
        for loader in ("load", "sharded_load"):
            if hasattr(module, loader):
                names[loader] = self.loading(getattr(module, loader))
        if hasattr(module, "save_prompt_cache"):
            names["save_prompt_cache"] = save_prompt_cache
        if hasattr(module, "load_prompt_cache"):
            names["load_prompt_cache"] = self.load_prompt_cache
        return names

    def load_prompt_cache(self, *args: Any, **kwargs: Any) -> Any:
        """:func:`xkv.load_prompt_cache`; without flags of its own a run takes the file's."""
        loaded = load_prompt_cache(*args, **kwargs)
        cache = lowrank_cache(loaded[0] if kwargs.get("return_metadata") else loaded)
        if cache is None:
            print(f"Note: the prompt cache in {args[0]} is not compressed", file=sys.stderr)
            self.config = None
            return loaded
        cache.backend = MLXBackend(self.args.kernels)
        if not has_compression_flags(self.args):
            self.config, self.grouping = cache.config, "consecutive"
        return loaded

    def find_profile(self, path: str) -> Profile | None:
        """The profile for a model; ``--grouping`` is about the command line's own.

        Raises:
            InputError: If it cannot be had.
        """
        is_own = self.args.model in (None, path)
        grouping = self.grouping if is_own or self.grouping == "consecutive" else None
        if mx.distributed.init().size() > 1:
            if grouping not in (None, "consecutive"):
                raise InputError(
                    "--grouping is about whole models, and this one runs on several devices: leave "
                    "it out"
                )
            return None
        given = vars(self.args)
        trust = bool(given.get("trust_remote_code"))
        return choose_profile(
            grouping, given.get("group_size"), path, "mlx", trust_remote_code=trust
        )

    def take_model(self, model: Any, tokenizer: Any, config: XKVConfig) -> None:
        """Enable a model that was loaded; calibrated, if it is met for the first time."""
        report = enable(model, config, backend=MLXBackend(self.args.kernels))
        if mx.distributed.init().size() == 1:
            calibrate_enabled(model, tokenizer, config, self.args.no_calibration)
        if mx.distributed.init().rank() == 0:
            print(report, file=sys.stderr)
        self.models.append(model)

    def speed_up(self, model: Any) -> None:
        """Let a model that was loaded compute in float32, on a CPU with OpenBLAS."""
        text = speed_up(model)
        if text is not None and not self.models and mx.distributed.init().rank() == 0:
            print(text, file=sys.stderr)

    def check_tokenizer(self, path: str, tokenizer: Any) -> None:
        """Keep the model's tokenizer, and refuse a draft model with another.

        Raises:
            InputError: If its tokens are not the model's.
        """
        if self.tokenizer is None:
            self.tokenizer = tokenizer
        elif tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                f"the draft model {path} has another tokenizer than the model, so that its tokens "
                "mean other text: take one of the same family"
            )

    def loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """mlx-lm's ``load`` or ``sharded_load``, after which the model is taken."""

        def load_and_enable(path: str, *args: Any, **kwargs: Any) -> Any:
            profile = None if self.config is None else self.find_profile(path)
            with load_errors(path):
                loaded = load(path, *args, **kwargs)
            model, config = loaded[0], self.config
            self.check_tokenizer(path, loaded[1])
            self.speed_up(model)
            if config is not None and profile is not None:
                config = profile.apply(config, identity_of(model, config))
            if config is not None and enabled_state(model) is None:
                self.take_model(model, loaded[1], config)
            return loaded

        return load_and_enable


def run(name: str, argv: Sequence[str] | None = None, *, command: Command) -> None:
    """Run ``mlx_lm.NAME``'s ``main`` with compressed caches.

    Args:
        name: "generate", "chat", "server" or "cache_prompt".
        argv: Arguments; None takes the program's.
        command: What to add and to replace.

    Raises:
        InputError: If what the flags ask for cannot be met.
    """
    module = borrowed.module(f"mlx_lm.{name}")
    command.name = name
    before = sys.argv, sys.stdin
    sys.argv = [name, *(sys.argv[1:] if argv is None else argv)]
    try:
        with replaced(module, command.replacements(module)):
            module.main()
    except ValueError as error:
        # a mistake that mlx-lm's own main has found
        if traceback.extract_tb(error.__traceback__)[-1].filename == module.__file__:
            raise InputError(str(error)) from error
        raise
    finally:
        sys.argv, sys.stdin = before
        for model in command.models:
            if enabled_state(model) is not None:
                disable(model)


@contextlib.contextmanager
def replaced(module: Any, names: dict[str, Any]) -> Iterator[None]:
    """Give a module other globals for a while."""
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    try:
        vars(module).update(names)
        yield
    finally:
        for name in names:
            if name in before:
                vars(module)[name] = before[name]
            else:
                del vars(module)[name]
