"""PyTorch on a GPU against PyTorch on the CPU in float64, without MLX.

    python scripts/parity_gpu.py
    python scripts/parity_gpu.py --device cpu

Every operation; the logits of an answer out of a compressed cache of the bundled model; and those
of :func:`xkv.torch_decoder`, on CUDA replays of one graph, against ordinary steps. Exit code 1 if
an error exceeds its tolerance, or if on a GPU plain operations ran instead of a kernel or a graph.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

import xkv
from xkv.backends.torch_cuda import TorchBackend
from xkv.backends.torch_cuda.model.cache import torch_cache
from xkv.checks.parity import (
    FORMS,
    HEADER,
    LOGITS_TOLERANCE,
    PROMPT_TOKENS,
    RANK,
    Line,
    compare_operations,
)
from xkv.checks.tolerances import relative_error
from xkv.tiny import CHECKPOINT_DIR, make_document

Step = Callable[[torch.Tensor], torch.Tensor]

RECENT = {"window": 24, "max_tail": 24}
"""So few dense rows that the tail is folded between the steps."""
CONFIGS = {
    name: xkv.XKVConfig(rank_k=RANK, rank_v=RANK, **RECENT, **options)
    for name, options in FORMS.items()
}
IN_BITS = {"working set in bits": xkv.XKVConfig(compression=4, **RECENT)}
"""Not compared across devices: where two round a number to different codes, both are right."""


def load(device: torch.device, dtype: torch.dtype, exact: bool = False) -> Any:
    """The bundled model with its weights rounded to a dtype; exact ones hold them in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=dtype)
    return (model.double() if exact else model).to(device).eval().requires_grad_(False)


def make_prompt() -> torch.Tensor:
    """A document and a question about it, ``[1, L]``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    document = make_document(seed=5, n_tokens=PROMPT_TOKENS)
    content = f"{document.text}\n\n{document.facts[1].question}"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


class Run:
    """One prompt's compressed cache on one device, and the steps after it."""

    def __init__(self, model: Any, config: xkv.XKVConfig, prompt: torch.Tensor) -> None:
        self.backend = TorchBackend(model.device, "off" if model.device.type == "cpu" else "auto")
        self.model, self.prompt = model, prompt.to(model.device)
        self.cache = torch_cache(model, config, backend=self.backend)
        xkv.torch_prefill(model, self.cache, self.prompt)
        assert self.cache.sequences[0].layers[0].is_compressed
        self.backend.kernels.last_path.clear()

    def ordinary(self, token: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, vocabulary]`` of one step."""
        return self.model(token, cache=self.cache, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def steps(
        self, n_steps: int, answer: list[int] | None = None, step: Step | None = None
    ) -> tuple[list[int], np.ndarray]:
        """The best tokens, or those of an answer instead, and logits ``[n_steps, vocabulary]``."""
        token, tokens, logits = self.prompt[:, -1:], [], []
        for i in range(n_steps):
            row = (step or self.ordinary)(token)[0].double().cpu()
            logits.append(row.numpy())
            tokens.append(int(row.argmax()) if answer is None else answer[i])
            token = torch.tensor([[tokens[-1]]], device=self.model.device)
        return tokens, np.stack(logits)

    @property
    def path(self) -> str:
        """What rebuilt keys in the steps, plain if anything was; where all are, products do."""
        paths = self.backend.kernels.last_path
        return "plain" if "plain" in paths.values() else paths.get("key_scores", "plain")


def compare_generation(device: torch.device, n_steps: int) -> Iterator[Line]:
    """Steps on a device beside the same ones in float64 on the CPU, which chooses the tokens."""
    prompt = make_prompt()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model, exact = load(device, dtype), load(torch.device("cpu"), dtype, exact=True)
        for form, config in CONFIGS.items():
            answer, want = Run(exact, config, prompt).steps(n_steps)
            run = Run(model, config, prompt)
            _, got = run.steps(n_steps, answer)
            error = relative_error(got, want)
            detail = f"{form}, {n_steps} steps"
            if device.type == "cuda" and run.path == "plain" and config.attention != "exact":
                error, detail = float("inf"), f"{detail}: plain operations ran instead of a kernel"
            found = name, device.type, run.path, error, LOGITS_TOLERANCE[name], detail
            yield Line("generation, logits", *found)


def compare_replays(device: torch.device, n_steps: int) -> Iterator[Line]:
    """Steps of constant shapes beside ordinary ones, which choose the tokens."""
    prompt, model = make_prompt(), load(device, torch.float32)
    for form, config in (CONFIGS | IN_BITS).items():
        run = Run(model, config, prompt)
        answer, want = run.steps(n_steps)
        with mock.patch.object(torch.cuda, "CUDAGraph", _CountingGraph):
            _CountingGraph.n_replays = 0
            other = Run(model, config, prompt)
            _, got = other.steps(n_steps, answer, xkv.torch_decoder(model, other.cache))
        error, n_replays = relative_error(got, want), _CountingGraph.n_replays
        if device.type == "cuda" and not n_replays:
            error = float("inf")
        detail = f"{form}, {n_replays} of {n_steps} steps were replays"
        found = "float32", device.type, other.path, error, LOGITS_TOLERANCE["float32"], detail
        yield Line("replays, logits", *found)


class _CountingGraph(torch.cuda.CUDAGraph):
    n_replays = 0

    def replay(self) -> None:
        _CountingGraph.n_replays += 1
        super().replay()


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--max-tokens", "-m", type=int, default=60, help="steps of each answer")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: this machine has no CUDA device; try --device cpu")
    transformers.utils.logging.disable_progress_bar()
    backend = TorchBackend(args.device)
    device = backend.device
    print(f"{backend.device_name}, torch {torch.__version__}\n\n{HEADER}")
    comparisons = itertools.chain(
        compare_operations([backend]),
        compare_generation(device, args.max_tokens),
        compare_replays(device, args.max_tokens),
    )
    lines = []
    for line in comparisons:
        print(line, flush=True)
        lines.append(line)
    n_misses = sum(line.is_miss for line in lines)
    if n_misses:
        sys.exit(f"{n_misses} of {len(lines)} errors exceed their tolerance")
    print(f"all {len(lines)} errors are within their tolerances")


if __name__ == "__main__":
    main()
