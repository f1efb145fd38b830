"""A model with random weights on one device: full cache, working set, every row."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from gpu_caches import DenseLayer, Recorded, copied, tensors
from gpu_rows import REPLAYED, Row
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

import xkv
from xkv.backends.torch_cuda import TorchBackend
from xkv.backends.torch_cuda.model.cache import torch_cache
from xkv.config import USUAL_COMPRESSION
from xkv.errors import InputError

SHAPE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072 + 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
TINY = SHAPE | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 512,
}
OPTIONS = {"compression": USUAL_COMPRESSION}
TINY_OPTIONS = {"compression": 4, "budget": 128, "window": 16, "max_tail": 16}
WARM_UP = 2
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For full attention of growing length: cuDNN plans each new length, some 40 ms on an H100."""


class Bench:
    """A random model on one device.

    Args:
        args: Those of ``scripts/bench_gpu.py``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.perf_counter()
        self.left_out: list[str] = []
        """Sentences about rows that there are none of."""
        self.backend = TorchBackend(args.device, args.kernels)
        device = self.backend.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**(TINY if args.tiny else SHAPE))
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        options = TINY_OPTIONS if args.tiny else OPTIONS
        self.forms: dict[str, dict[str, Any] | None] = {
            "full": None,
            "working set": options,
            "every row": {**options, "attention": "exact"},
        }

    def run(self) -> Iterator[Row]:
        for n_tokens in self.args.lengths:
            generator = torch.Generator().manual_seed(n_tokens)
            size = (1, n_tokens)
            vocabulary = self.model.config.vocab_size
            prompt = torch.randint(0, vocabulary, size, generator=generator)
            for form, options in self.forms.items():
                what = f"{n_tokens:,} tokens, {form}"
                if not self.is_late(what):
                    try:
                        yield from self._form(form, options, prompt.to(self.backend.device))
                    except torch.OutOfMemoryError:
                        self.left_out.append(f"{what}: the prompt does not fit into memory")
                    self._collect()

    def is_late(self, what: str) -> bool:
        """Whether there is no time left to begin something, which is then said."""
        limit = self.args.max_seconds
        if limit is None or time.perf_counter() - self.began < limit:
            return False
        self.left_out.append(f"{what}: not begun within {limit:.0f} seconds")
        return True

    def _form(
        self, form: str, options: dict[str, Any] | None, prompt: torch.Tensor
    ) -> Iterator[Row]:
        """Prefill once, then decode with batches of copies."""
        self._prefill(options, prompt[:, :2048])  # compiles kernels, and is not timed
        self._collect()
        self.backend.reset_peak_memory()
        began = time.perf_counter()
        cache, factorize_s = self._prefill(options, prompt)
        self.backend.evaluate()
        prefill_s = time.perf_counter() - began - factorize_s
        prefill_peak = self.backend.peak_memory()
        if options is not None and not cache.sequences[0].layers[0].is_compressed:
            raise InputError(f"{prompt.shape[1]} tokens are too few: {cache.notice}")
        one = copied(cache, lambda x: x.cpu())
        del cache
        for replays in {None: [False], "also": [False, True], "only": [True]}[self.args.replay]:
            name = form + REPLAYED if replays else form
            for batch in self.args.batches:
                what = f"{prompt.shape[1]:,} tokens, {name}, batch {batch}"
                if self.is_late(what):
                    return
                try:
                    times = self._decode(one, batch, self.args.steps, replays)
                except torch.OutOfMemoryError:
                    self.left_out.append(f"{what}: does not fit into memory")
                    break
                low, median, high = statistics.quantiles(times["step"], n=4, method="inclusive")
                yield Row(
                    prompt.shape[1],
                    name,
                    batch,
                    prefill_s,
                    factorize_s,
                    median * 1e3,
                    low * 1e3,
                    high * 1e3,
                    batch * len(times["step"]) / sum(times["step"]),
                    times["held"],
                    prefill_peak,
                    self.backend.peak_memory(),
                )

    @torch.inference_mode()
    def _prefill(self, options: dict[str, Any] | None, prompt: torch.Tensor) -> tuple[Any, float]:
        if options is not None:
            cache = torch_cache(self.model, xkv.XKVConfig(**options), backend=self.backend)
            xkv.torch_prefill(self.model, cache, prompt)
            return cache, cache.factorize_seconds
        self.model.set_attn_implementation("sdpa")
        n_rows = prompt.shape[1] + self.args.steps + WARM_UP
        n_layers = self.model.config.num_hidden_layers
        dense = Cache(layers=[DenseLayer(n_rows) for _ in range(n_layers)])
        self.model.model(prompt[:, :-1], cache=dense, use_cache=True)
        return dense, 0.0

    @torch.no_grad()
    def _decode(self, one: Cache, batch: int, n_steps: int, replays: bool) -> dict[str, Any]:
        self._collect()
        device = self.backend.device
        cache = copied(one, lambda x: x.to(device).repeat(batch, *[1] * (x.ndim - 1)))
        is_full = isinstance(cache.layers[0], DenseLayer)
        self.model.set_attn_implementation("sdpa" if is_full else "xkv")
        self.backend.reset_peak_memory()
        token = torch.full((batch, 1), 7, device=device)

        def ordinary(token: torch.Tensor) -> torch.Tensor:
            return self.model(token, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        times = []
        with sdpa_kernel(NOT_CUDNN):
            decode: Callable[[torch.Tensor], torch.Tensor] = ordinary
            if replays and is_full:
                decode = Recorded(cache, ordinary, token)
            elif replays:
                decode = xkv.torch_decoder(self.model, cache)
            for step in range(WARM_UP + n_steps):
                began = time.perf_counter()
                token = decode(token).argmax(-1, keepdim=True)
                self.backend.evaluate()
                if step >= WARM_UP:
                    times.append(time.perf_counter() - began)
        return {"step": times, "held": sum(x.nbytes for x in tensors(cache))}

    def _collect(self) -> None:
        gc.collect()
        if self.backend.device.type == "cuda":
            torch.cuda.empty_cache()

    def group_keys(self) -> list[torch.Tensor]:
        """Keys of the first four layers over a prompt, ``[L, n_kv_heads, head_dim]`` float32."""
        middle = self.args.lengths[len(self.args.lengths) // 2]
        n_tokens = self.args.factorize_tokens or min(middle, 65536)
        prompt = torch.randint(0, 100, (1, n_tokens + 1), device=self.backend.device)
        cache, _ = self._prefill(None, prompt)
        rows = [layer.keys[0, :, :n_tokens].float() for layer in cache.layers[:4]]
        return [x.transpose(0, 1).contiguous() for x in rows]
