"""xKV on PyTorch: the reference backend, the transformers cache and the generation engine."""

from __future__ import annotations

from typing import Any

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.cli.engine import Engine
from xkv.config import XKVConfig
from xkv.ops.kernels import KernelMode
from xkv.planning.language_model import LanguageModel

__all__ = [
    "TorchBackend",
    "load_engine",
    "load_language_model",
    "load_torch_cache",
    "make_backend",
    "save_prompt_cache",
    "torch_cache",
    "torch_decoder",
    "torch_prefill",
]


def make_backend(device: str | None = None, kernels: KernelMode = "auto") -> TorchBackend:
    """The PyTorch backend on ``device`` (default: CUDA if there is one, else the CPU)."""
    return TorchBackend(device, kernels)


def load_engine(model: str, **options: Any) -> Engine:
    """See :func:`xkv.cli.engine.load_engine`; imports transformers, which the backend does not."""
    from xkv.backends.torch_cuda.model import engine

    return engine.load_engine(model, **options)


def load_language_model(model: str, **options: Any) -> LanguageModel:
    """See :func:`xkv.planning.language_model.load_language_model`."""
    from xkv.backends.torch_cuda.model import language_model

    return language_model.TorchLanguageModel(model, **options)


def torch_cache(model: Any, config: XKVConfig) -> Any:
    """See :func:`xkv.torch_cache`."""
    from xkv.backends.torch_cuda.model import cache

    return cache.torch_cache(model, config)


def torch_prefill(model: Any, cache: Any, input_ids: Any, **options: Any) -> None:
    """See :func:`xkv.torch_prefill`."""
    from xkv.backends.torch_cuda.model import prefill

    prefill.prefill(model, cache, input_ids, **options)


def torch_decoder(model: Any, cache: Any) -> Any:
    """See :func:`xkv.torch_decoder`."""
    from xkv.backends.torch_cuda.model import decoder

    return decoder.Decoder(model, cache)


def save_prompt_cache(file_name: str, cache: Any, metadata: dict[str, str] | None = None) -> None:
    """See :func:`xkv.save_prompt_cache`."""
    from xkv.backends.torch_cuda.model import files

    files.save_prompt_cache(file_name, cache, metadata)


def load_torch_cache(model: Any, file_name: str, config: XKVConfig | None = None) -> Any:
    """See :func:`xkv.load_torch_cache`."""
    from xkv.backends.torch_cuda.model import files

    return files.load_prompt_cache(model, file_name, config)
