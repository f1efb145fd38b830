"""Decode with full attention, dense low-rank and selective xKV, end to end on one device.

    python scripts/bench_gpu.py --out scripts/results/gpu
    python scripts/bench_gpu.py --device cpu --tiny

A Llama with random weights in the shapes of Llama-3.1-8B. Each form prefills one prompt; a larger
batch holds copies of its cache. Every figure is wall clock of the whole model on a synchronized
device, warm-up excluded. A step that folds the tail counts like any other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_caches import DenseLayer, copied, tensors
from gpu_factorizations import compare_factorizations
from gpu_rows import Row, markdown, summary
from transformers.cache_utils import Cache

import xkv
from xkv.backends.torch_cuda import TorchBackend
from xkv.backends.torch_cuda.model.cache import torch_cache
from xkv.checks.decode_step import BUNDLED, LLAMA_8B, DecodeStep
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
PAPER = {"rank_k": 384, "rank_v": 576, "budget": 2048}
SMALL = {"rank_k": 24, "rank_v": 36, "budget": 64, "window": 16, "max_tail": 16}
WARM_UP = 2


class Bench:
    """A random model on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.backend = TorchBackend(args.device, args.kernels)
        device = self.backend.device
        is_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if is_gpu else torch.float32
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**(TINY if args.tiny else SHAPE))
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        options = SMALL if args.tiny else PAPER
        self.forms: dict[str, dict[str, Any] | None] = {
            "full": None,
            "dense low-rank": {**options, "attention": "dense"},
            "selective": {**options, "attention": "selective"},
        }
        self.free_bytes = torch.cuda.mem_get_info(device)[0] if is_gpu else None

    def run(self) -> Iterator[Row]:
        for n_tokens in self.args.lengths:
            generator = torch.Generator().manual_seed(n_tokens)
            size = (1, n_tokens)
            vocabulary = self.model.config.vocab_size
            prompt = torch.randint(0, vocabulary, size, generator=generator)
            for form, options in self.forms.items():
                yield from self._form(form, options, prompt.to(self.backend.device))

    def _form(self, form: str, options: dict[str, Any] | None, prompt: torch.Tensor) -> Any:
        """Prefill once, then decode at growing batches of copies."""
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
        largest = self._largest(one)
        batches = [2**i for i in range(20) if 2**i < largest] + [largest]
        for batch in batches:
            times = self._decode(one, batch, self.args.steps)
            low, median, high = statistics.quantiles(times["step"], n=4)
            yield Row(
                prompt.shape[1],
                form,
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
                batch == largest,
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

    def _largest(self, one: Cache) -> int:
        """The largest batch of which a step runs."""
        if self.free_bytes is None:
            return self.args.max_batch
        batch = max(int(self.free_bytes / sum(x.nbytes for x in tensors(one))), 1)
        while not self._fits(one, batch):
            batch = min(batch - 1, int(batch * 0.97))
            if batch < 1:
                raise InputError("not even a batch of one fits")
        while self._fits(one, batch + 1):
            batch += 1
        return batch

    def _fits(self, one: Cache, batch: int) -> bool:
        with contextlib.suppress(torch.OutOfMemoryError):
            self._decode(one, batch, 2)
            return True
        return False

    @torch.no_grad()
    def _decode(self, one: Cache, batch: int, n_steps: int) -> dict[str, Any]:
        self._collect()
        device = self.backend.device
        cache = copied(one, lambda x: x.to(device).repeat(batch, *[1] * (x.ndim - 1)))
        attention = "sdpa" if isinstance(cache.layers[0], DenseLayer) else "xkv"
        self.model.set_attn_implementation(attention)
        self.backend.reset_peak_memory()
        token = torch.full((batch, 1), 7, device=device)

        def ordinary(token: torch.Tensor) -> torch.Tensor:
            return self.model(token, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        replays = self.args.replay and attention == "xkv"
        decode = xkv.torch_decoder(self.model, cache) if replays else ordinary
        times = []
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
        n_tokens = min(self.args.lengths[len(self.args.lengths) // 2], 65536)
        prompt = torch.randint(0, 100, (1, n_tokens + 1), device=self.backend.device)
        cache, _ = self._prefill(None, prompt)
        rows = [layer.keys[0, :, :n_tokens].float() for layer in cache.layers[:4]]
        return [x.transpose(0, 1).contiguous() for x in rows]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--kernels", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--lengths", type=int, nargs="+", help="32k, 64k and 128k, or 1k and 2k")
    parser.add_argument("--steps", type=int, default=144, help="timed steps of each batch")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each factorization")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="low-rank forms decode in steps of constant shapes, on CUDA replays of one graph; "
        "full attention does not",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=2,
        help="on the CPU, in place of what fits",
    )
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    args.lengths = args.lengths or ([1024, 2048] if args.tiny else [32768, 65536, 131072])
    if args.steps < 2 or args.runs < 2:
        sys.exit("error: --steps and --runs must be at least 2, for a median with spread")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device; try --device cpu --tiny")
    logging.basicConfig(format="%(message)s")
    try:
        bench = Bench(args)
        problem = DecodeStep(bench.backend, BUNDLED if args.tiny else LLAMA_8B, 1024).parity()
        if problem is not None:
            sys.exit(f"error: no figures while the forms disagree: {problem}")
        about = {
            "machine": f"{platform.machine()} {platform.system()}",
            "device": bench.backend.device_name,
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "command": " ".join(["python", *sys.argv]),
            "model": TINY if args.tiny else SHAPE,
            "dtype": str(bench.dtype),
            "forms": bench.forms,
        }
        print(f"{about['device']}, {about['versions']}, {args.steps} steps, {about['dtype']}")
        rows = []
        for row in bench.run():
            rows.append(row)
            print(", ".join(f"{name} {text}" for name, text in row.cells().items()), flush=True)
        rank = (SMALL if args.tiny else PAPER)["rank_k"]
        factorizations = compare_factorizations(
            bench.backend, bench.group_keys(), rank, args.runs, bench.dtype
        )
    except InputError as error:
        sys.exit(f"error: {error}")
    report = "\n\n".join(
        [
            markdown([row.cells() for row in rows]),
            "\n".join(f"* {line}" for line in summary(rows)),
            markdown([{k: _short(x) for k, x in entry.items()} for entry in factorizations]),
        ]
    )
    print(f"\n{report}")
    if args.out:
        about |= {"rows": [asdict(row) for row in rows], "factorizations": factorizations}
        Path(f"{args.out}.json").write_text(json.dumps(about, indent=2) + "\n")
        head = f"`{about['command']}` on {about['device']}, {about['versions']}, {about['dtype']}"
        Path(f"{args.out}.md").write_text(f"{head}\n\n{report}\n")


def _short(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


if __name__ == "__main__":
    main()
