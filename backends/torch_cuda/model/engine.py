"""Generation on PyTorch: transformers' own loading and ``generate``, with our cache underneath."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import xkv_attention
from xkv.backends.torch_cuda.model.cache import identity_of, torch_cache
from xkv.backends.torch_cuda.model.calibration import TorchSubject
from xkv.backends.torch_cuda.model.prefill import prefill
from xkv.backends.torch_cuda.model.probe import cache_argument
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.cache.describe import describe
from xkv.cli.engine import Engine, Generation, Progress, Sampling
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.profile import ModelIdentity


class _Streamer(TextStreamer):
    """Hands finished text to a callback instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


class TorchEngine(Engine):
    """A model loaded by ``AutoModelForCausalLM``."""

    def __init__(self, model: Any, tokenizer: Any, backend: TorchBackend) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.backend = backend

    @property
    def identity(self) -> ModelIdentity:
        return identity_of(self.model)

    def subject(self, config: XKVConfig) -> TorchSubject:
        return TorchSubject(self.model, config, self.backend)

    @torch.inference_mode()
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
            torch.manual_seed(sampling.seed)
        with xkv_attention(self.model) if config is not None else contextlib.nullcontext():
            cache: Any = DynamicCache(config=self.model.config)
            if config is not None:
                cache = torch_cache(
                    self.model,
                    config,
                    backend=self.backend,
                    on_progress=lambda done, total: on_progress("factorize", done, total),
                )
            basis = cache.sequences[0].basis if config is not None else None
            before = self.backend.active_memory() - (basis.nbytes if basis else 0)
            self.backend.reset_peak_memory()
            tokens = torch.tensor([list(prompt)], device=self.backend.device)
            began = time.perf_counter()
            self._prefill(tokens, cache, prefill_step_size, on_progress)
            factorized = cache.factorize_seconds if config is not None else 0.0
            self.backend.evaluate(tokens)
            prefilled = time.perf_counter() - factorized
            output = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=_Streamer(self.tokenizer, on_text),
                generation_config=self._generation_config(sampling),
                **{cache_argument(self.model): cache},
            )
            self.backend.evaluate(output)
            ended = time.perf_counter()
        answer = output[0, tokens.shape[1] :].tolist()
        n_generated = len(answer)
        if answer and answer[-1] in self.end_tokens():
            answer.pop()
        del output, tokens
        is_ours, basis_bytes = isinstance(cache, XKVCache), basis.nbytes if basis else 0
        plain = 0 if is_ours else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        factorize_seconds = cache.factorize_seconds if is_ours else 0.0
        return Generation(
            text=self.tokenizer.decode(answer, skip_special_tokens=True),
            tokens=tuple(answer),
            n_prompt=len(prompt),
            prefill_seconds=prefilled - began,
            factorize_seconds=factorize_seconds,
            decode_tps=n_generated / (ended - prefilled - factorize_seconds),
            peak_bytes=self.backend.peak_memory(),
            dense_bytes=cache.dense_bytes() if is_ours else plain,
            held_bytes=cache.held_bytes() if is_ours else plain,
            allocated_bytes=self.backend.active_memory() - before - basis_bytes,
            basis_bytes=basis_bytes,
            notice=cache.notice if is_ours else None,
            detail=describe(cache.sequences[0]) if is_ours else None,
        )

    def _prefill(
        self, tokens: torch.Tensor, cache: Any, step_size: int, on_progress: Progress
    ) -> None:
        """Run all but the last token through the model, as mlx-lm does."""

        def progress(done: int, total: int) -> None:
            on_progress("prefill", done, total)

        if isinstance(cache, XKVCache):
            prefill(self.model, cache, tokens, step_size=step_size, on_progress=progress)
            return
        total = tokens.shape[1] - 1
        progress(0, total)
        for start in range(0, total, step_size):
            piece = tokens[:, start : min(start + step_size, total)]
            self.model(
                input_ids=piece,
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(self.model): cache},
            )
            self.backend.evaluate(piece)
            progress(start + piece.shape[1], total)

    def _generation_config(self, sampling: Sampling) -> transformers.GenerationConfig:
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self.end_tokens(),
            pad_token_id=self.tokenizer.pad_token_id or self.end_tokens()[0],
            do_sample=sampling.temp > 0,
        )
        if sampling.temp > 0:
            config.temperature = sampling.temp
            config.top_p = sampling.top_p or 1.0
            config.min_p = sampling.min_p or None
            config.top_k = sampling.top_k
        return config

    def end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [ends]


def load_engine(model: str, *, trust_remote_code: bool = False, **options: Any) -> TorchEngine:
    """Load a local directory or a Hugging Face repository with transformers.

    Raises:
        InputError: If there is no such model, or transformers does not know its type.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model} has no config.json, so it is not a model directory")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    backend = TorchBackend(**options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", trust_remote_code=trust_remote_code
        )
    # what transformers and safetensors raise for anything they cannot load
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"transformers cannot load {model}: {first_line}") from error
    loaded.eval()
    torch.nn.Module.to(loaded, backend.device)
    return TorchEngine(loaded, tokenizer, backend)
