"""Evaluation of compressed caches: tasks with scores, methods side by side, honest bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xkv.backend import load_backend_module

if TYPE_CHECKING:
    from xkv.evaluation.model import LanguageModel


def load_language_model(backend: str, model: str, **options: Any) -> LanguageModel:
    """Load a model for evaluation.

    Args:
        backend: "mlx" or "torch".
        model: A local directory or a Hugging Face repository.
        options: ``trust_remote_code``.

    Raises:
        InputError: If the framework is missing, the model cannot be loaded, or its cache is of
            another kind than the methods compress.
    """
    return load_backend_module(backend).load_language_model(model, **options)
