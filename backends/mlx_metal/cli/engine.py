"""Generation on MLX: mlx-lm's own loading and decoding loop, with our cache underneath."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.calibration import MLXSubject
from xkv.backends.mlx_metal.model.dense_prompt import compressed_copy, prefill_dense
from xkv.backends.mlx_metal.model.drafts import N_DRAFTS, DraftCount
from xkv.backends.mlx_metal.model.enable import disable, enable, identity_of
from xkv.backends.mlx_metal.model.enabled import enabled_state, lowrank_cache
from xkv.backends.mlx_metal.model.float32 import speed_up
from xkv.backends.mlx_metal.model.memory import dense_bytes
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.cache.describe import describe
from xkv.cli.engine import Engine, Generation, Progress, Sampling
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.profile import ModelIdentity

mlx_lm = borrowed.module("mlx_lm")
mlx_cache = borrowed.module("mlx_lm.models.cache")


@dataclass(frozen=True)
class DensePrompt:
    """A prompt, but for its last token, in the full cache: ``dense_prompt.prefill_dense``."""

    caches: list[Any]
    step_size: int
    seconds: float


class MLXEngine(Engine):
    """A model loaded by ``mlx_lm.load``."""

    def __init__(self, model: Any, tokenizer: Any, backend: MLXBackend) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend

    @property
    def identity(self) -> ModelIdentity:
        return identity_of(self.model, XKVConfig())

    def subject(self, config: XKVConfig) -> MLXSubject:
        return MLXSubject.of(self.model, config, self.backend)

    def speed_up(self) -> str | None:
        return speed_up(self.model)

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
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        return self.answer(
            prompt,
            config,
            on_text,
            on_progress,
            max_tokens=sampling.max_tokens,
            sampler=borrowed.module("mlx_lm.sample_utils").make_sampler(
                sampling.temp, sampling.top_p, sampling.min_p, top_k=sampling.top_k
            ),
            prefill_step_size=prefill_step_size,
        )

    def answer(
        self,
        prompt: Sequence[int],
        config: XKVConfig | None,
        on_text: Callable[[str], None],
        on_progress: Progress,
        *,
        prompt_cache: list[Any] | None = None,
        draft_model: Any = None,
        dense: DensePrompt | None = None,
        **options: Any,
    ) -> Generation:
        """:meth:`generate` with the options of ``mlx_lm.stream_generate`` instead of ours.

        Args:
            dense: The prompt, if it is in the full cache already, from which ours is made. An
                answer out of the full cache is written behind it.
        """
        # groups that the configuration names are the model's
        draft = config and replace(config, groups=None)
        with self._enabled(self.model, config, on_progress), self._enabled(draft_model, draft):
            if dense is not None:
                cache, enabled = dense.caches, enabled_state(self.model)
                if enabled is not None:
                    cache = compressed_copy(enabled, cache, dense.step_size)
                answer = self._stream(prompt[-1:], cache, on_text, on_progress, **options)
                return replace(
                    answer, n_prompt=len(prompt), prefill_seconds=dense.seconds, peak_bytes=None
                )
            # mlx-lm has no cache of a largest size for a draft model's drafts
            size = options.get("max_kv_size") if draft_model is None else None
            cache = prompt_cache or [
                layer
                for model in (self.model, draft_model)
                if model is not None
                for layer in mlx_cache.make_prompt_cache(model, size)
            ]
            return self._stream(
                prompt, cache, on_text, on_progress, draft_model=draft_model, **options
            )

    def prefill(
        self, prompt: Sequence[int], step_size: int, on_progress: Progress, size: int | None = None
    ) -> DensePrompt:
        """Take a prompt into the full cache, of at most ``size`` tokens."""
        caches = mlx_cache.make_prompt_cache(self.model, size)
        began = time.perf_counter()
        prefill_dense(
            *(self.model, caches, prompt[:-1], step_size),
            lambda done, total: on_progress("prefill", done, total),
        )
        return DensePrompt(caches, step_size, time.perf_counter() - began)

    @contextlib.contextmanager
    def _enabled(
        self, model: Any, config: XKVConfig | None, on_progress: Progress = lambda *step: None
    ) -> Iterator[None]:
        if config is None or model is None:
            yield
            return
        enable(model, config, backend=self.backend)
        state = enabled_state(model)
        assert state is not None
        state.on_factor = lambda done, total: on_progress("factorize", done, total)
        try:
            yield
        finally:
            disable(model)

    def _stream(
        self,
        prompt: Sequence[int],
        cache: list[Any],
        on_text: Callable[[str], None],
        on_progress: Progress,
        **options: Any,
    ) -> Generation:
        compressed = lowrank_cache(cache)
        basis = compressed.basis if compressed else None
        before = self.backend.active_memory() - sum(layer.nbytes for layer in cache)
        before -= basis.nbytes if basis else 0
        self.backend.reset_peak_memory()
        text, tokens, finish = [], [], None
        drafts = DraftCount(options.get("num_draft_tokens", N_DRAFTS), options["max_tokens"])
        for response in mlx_lm.stream_generate(
            self.model,
            self.tokenizer,
            list(prompt),
            prompt_cache=cache,
            prompt_progress_callback=lambda done, total: on_progress("prefill", done, total),
            **options,
        ):
            text.append(response.text)
            on_text(response.text)
            tokens.append(response.token)
            drafts.count(response.from_draft)
            finish = response.finish_reason
        prompt_seconds = response.prompt_tokens / response.prompt_tps
        decode_tps = response.generation_tps
        del response
        if finish == "stop":
            tokens.pop()
        basis_bytes = basis.nbytes if basis else 0
        factorize_seconds = compressed.factorize_seconds if compressed else 0.0
        return Generation(
            text="".join(text),
            tokens=tuple(tokens),
            n_prompt=len(prompt),
            prefill_seconds=prompt_seconds - factorize_seconds,
            factorize_seconds=factorize_seconds,
            decode_tps=decode_tps,
            peak_bytes=self.backend.peak_memory(),
            dense_bytes=sum(dense_bytes(layer) for layer in flatten(cache)),
            held_bytes=sum(layer.nbytes for layer in cache),
            allocated_bytes=self.backend.active_memory() - before - basis_bytes,
            basis_bytes=basis_bytes,
            notice=compressed.notice if compressed else None,
            detail=describe(compressed) if compressed else None,
            n_drafted=None if options.get("draft_model") is None else drafts.n_drafted,
            n_taken=drafts.n_taken,
        )


def load_engine(model: str, *, trust_remote_code: bool = False, **options: Any) -> MLXEngine:
    """Load a local directory or a Hugging Face repository with mlx-lm.

    Raises:
        InputError: If there is no such model, or mlx-lm does not know its type.
    """
    tokenizer_config = {"trust_remote_code": True} if trust_remote_code else {}
    with load_errors(model):
        loaded, tokenizer, *_ = mlx_lm.load(model, tokenizer_config=tokenizer_config)
    return MLXEngine(loaded, tokenizer, MLXBackend(**options))


@contextlib.contextmanager
def load_errors(model: str) -> Iterator[None]:
    """Say in one sentence why a model cannot be loaded.

    Raises:
        InputError: If there is no such model, or mlx-lm does not know its type.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model} has no config.json, so it is not a model directory")
    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {model!r} is neither a directory nor a repository that can be reached: "
            f"{_first_line(error)}"
        ) from error
    # unknown types, weights missing or too many, a config without a field, a broken file
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"mlx-lm cannot load {model}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
