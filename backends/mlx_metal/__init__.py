"""xKV on MLX: the backend, the mlx-lm cache and the generation engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.enable import disable, enable, make_prompt_cache
from xkv.backends.mlx_metal.model.files import load_prompt_cache, save_prompt_cache
from xkv.backends.mlx_metal.model.seam import attention_seam
from xkv.cli.engine import Engine
from xkv.config import XKVConfig
from xkv.ops.kernels import KernelMode
from xkv.planning.footprint import ModelFacts
from xkv.planning.language_model import LanguageModel

__all__ = [
    "MLXBackend",
    "XKVCache",
    "attention_seam",
    "disable",
    "enable",
    "load_engine",
    "load_language_model",
    "load_prompt_cache",
    "make_backend",
    "make_prompt_cache",
    "memory_bytes",
    "read_facts",
    "run_cache_prompt",
    "run_chat",
    "run_generate",
    "run_server",
    "save_prompt_cache",
]


def make_backend(kernels: KernelMode = "auto") -> MLXBackend:
    """The MLX backend on the default device."""
    return MLXBackend(kernels)


def load_engine(model: str, **options: Any) -> Engine:
    """See :func:`xkv.cli.engine.load_engine`."""
    from xkv.backends.mlx_metal.cli import engine

    return engine.load_engine(model, **options)


def read_facts(model: str, config: XKVConfig) -> ModelFacts:
    """See :mod:`xkv.plan`."""
    from xkv.backends.mlx_metal.model import plan

    return plan.read_facts(model, config)


def memory_bytes() -> int:
    """See :mod:`xkv.plan`."""
    from xkv.backends.mlx_metal.model import plan

    return plan.memory_bytes()


def run_chat(argv: Sequence[str] | None = None) -> None:
    """See :mod:`xkv.chat`."""
    from xkv.backends.mlx_metal.cli import chat

    chat.run_chat(argv)


def run_cache_prompt(argv: Sequence[str] | None = None) -> None:
    """See :mod:`xkv.cache_prompt`."""
    from xkv.backends.mlx_metal.cli import chat

    chat.run_cache_prompt(argv)


def run_generate(argv: Sequence[str] | None = None) -> None:
    """See :mod:`xkv.generate`."""
    from xkv.backends.mlx_metal.cli import generate

    generate.run_generate(argv)


def run_server(argv: Sequence[str] | None = None) -> None:
    """See :mod:`xkv.server`."""
    from xkv.backends.mlx_metal.server import command

    command.run_server(argv)


def load_language_model(model: str, **options: Any) -> LanguageModel:
    """See :func:`xkv.planning.language_model.load_language_model`."""
    from xkv.backends.mlx_metal.model import language_model

    return language_model.MLXLanguageModel(model, **options)
