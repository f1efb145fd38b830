"""``python -m xkv.generate`` on MLX: mlx-lm's command, answered and reported by our engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.cli.commands import Command, run
from xkv.backends.mlx_metal.cli.engine import DensePrompt, MLXEngine
from xkv.backends.mlx_metal.model.calibration import calibrate_enabled
from xkv.backends.mlx_metal.model.enable import disable, enable
from xkv.backends.mlx_metal.model.generation import STEP_SIZE
from xkv.cli.answer import show_answers, take_built_in_prompt
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.profile import Profile


def run_generate(argv: Sequence[str] | None = None) -> None:
    """Answer one prompt with all of mlx-lm's flags, out of a compressed cache."""
    run("generate", argv, command=Generate())


class Generate(Command):
    """mlx-lm's ``generate``, whose last step is ours."""

    def take(self, args: argparse.Namespace) -> None:
        if args.prompt is None:
            take_built_in_prompt(args)
        super().take(args)
        if args.compare and args.prompt_cache_file is not None:
            raise InputError("--compare needs the whole prompt, not --prompt-cache-file")

    def find_profile(self, path: str) -> Profile | None:
        # the model itself comes first; a draft model's groups are consecutive
        return None if self.models else super().find_profile(path)

    def take_model(self, model: Any, tokenizer: Any, config: XKVConfig) -> None:
        """Keep the model's configuration: the engine enables it, once for each answer."""
        if self.models:
            # groups that the configuration names are the model's, not the draft model's
            config = replace(config, groups=None)
        else:
            self.config = config
        if mx.distributed.init().size() == 1:
            enable(model, config, backend=MLXBackend(self.args.kernels))
            calibrate_enabled(model, tokenizer, config, self.args.no_calibration)
            disable(model)
        self.models.append(model)

    def replacements(self, module: Any) -> dict[str, Any]:
        return {**super().replacements(module), "generate": self.generate}

    def generate(
        self, model: Any, tokenizer: Any, prompt: Sequence[int], *, verbose: bool, **options: Any
    ) -> str:
        """In place of mlx-lm's ``generate``: prints like it, and what the cache holds."""
        engine = MLXEngine(model, tokenizer, MLXBackend(self.args.kernels))
        is_shared = self.args.compare and options.get("draft_model") is None
        dense: DensePrompt | None = None

        def answer(config: Any, on_text: Any, on_progress: Any) -> Any:
            nonlocal dense
            if is_shared and dense is None:
                step_size = options.get("prefill_step_size", STEP_SIZE)
                size = options.get("max_kv_size")
                dense = engine.prefill(prompt, step_size, on_progress, size)
            if self.args.seed is not None:
                mx.random.seed(self.args.seed)
            return engine.answer(prompt, config, on_text, on_progress, dense=dense, **options)

        if verbose:
            return show_answers(answer, self.config, self.args.compare).text
        return answer(self.config, lambda text: None, lambda *step: None).text
