"""Generation on MLX: mlx-lm's own loading and decoding loop, with our cache underneath."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx_lm.models import cache as mlx_cache
from mlx_lm.sample_utils import make_sampler

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.cache import XKVCache, make_prompt_cache
from xkv.backends.mlx_metal.seam import attention_seam
from xkv.config import XKVConfig
from xkv.engine import Engine, Generation, Progress, Sampling, describe
from xkv.errors import InputError


class MLXEngine(Engine):
    """A model loaded by ``mlx_lm.load``."""

    def __init__(self, model: Any, tokenizer: Any, backend: MLXBackend) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend

    def generate(
        self,
        prompt: Sequence[int],
        config: XKVConfig | None,
        sampling: Sampling,
        *,
        prefill_step_size: int = 2048,
        on_text: Callable[[str], None] = lambda text: None,
        on_progress: Progress = lambda phase, done, total: None,
    ) -> Generation:
        if config is None:
            cache = mlx_cache.make_prompt_cache(self.model)
        else:
            cache = make_prompt_cache(
                self.model,
                config,
                backend=self.backend,
                on_progress=lambda done, total: on_progress("factorize", done, total),
            )
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        sampler = make_sampler(sampling.temp, sampling.top_p, sampling.min_p, top_k=sampling.top_k)
        before = self.backend.active_memory()
        self.backend.reset_peak_memory()
        text, tokens, finish = [], [], None
        with attention_seam() if config is not None else contextlib.nullcontext():
            for response in mlx_lm.stream_generate(
                self.model,
                self.tokenizer,
                list(prompt),
                max_tokens=sampling.max_tokens,
                sampler=sampler,
                prompt_cache=cache,
                prefill_step_size=prefill_step_size,
                prompt_progress_callback=lambda done, total: on_progress("prefill", done, total),
            ):
                text.append(response.text)
                on_text(response.text)
                tokens.append(response.token)
                finish = response.finish_reason
        prompt_seconds = response.prompt_tokens / response.prompt_tps
        decode_tps = response.generation_tps
        del response
        if finish == "stop":
            tokens.pop()
        compressed = next((x.layer.group.cache for x in cache if isinstance(x, XKVCache)), None)
        factorize_seconds = compressed.factorize_seconds if compressed else 0.0
        held = sum(layer.nbytes for layer in cache)
        return Generation(
            text="".join(text),
            tokens=tuple(tokens),
            n_prompt=len(prompt),
            prefill_seconds=prompt_seconds - factorize_seconds,
            factorize_seconds=factorize_seconds,
            decode_tps=decode_tps,
            peak_bytes=self.backend.peak_memory(),
            dense_bytes=sum(_dense_bytes(layer) for layer in cache),
            held_bytes=held,
            allocated_bytes=self.backend.active_memory() - before,
            notice=compressed.notice if compressed else None,
            detail=describe(compressed) if compressed else None,
        )


def load_engine(model: str, *, trust_remote_code: bool = False, **options: Any) -> MLXEngine:
    """Load a local directory or a Hugging Face repository with mlx-lm.

    Raises:
        InputError: If there is no such model, or mlx-lm does not know its type.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model} has no config.json, so it is not a model directory")
    tokenizer_config = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        loaded, tokenizer, *_ = mlx_lm.load(model, tokenizer_config=tokenizer_config)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {model!r} is neither a directory nor a repository that can be reached: "
            f"{_first_line(error)}"
        ) from error
    # unknown types, weights missing or too many, a config without a field, a broken file
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"mlx-lm cannot load {model}: {_first_line(error)}") from error
    return MLXEngine(loaded, tokenizer, MLXBackend(**options))


def _dense_bytes(layer: Any) -> int:
    """What a layer's tokens take in a full cache without spare rows."""
    if isinstance(layer, XKVCache):
        return layer.layer.dense_bytes
    rows = layer.keys.shape[-2] if getattr(layer, "keys", None) is not None else 0
    return (
        layer.nbytes * layer.offset // rows
        if rows and type(layer) is mlx_cache.KVCache
        else (layer.nbytes)
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
