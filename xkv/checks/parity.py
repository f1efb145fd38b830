"""Every operation and a short generation on both backends, compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.checks.decode_cases import DTYPES, make_inputs
from xkv.checks.operations import OPERATIONS, PARITY_CASES
from xkv.checks.tolerances import PLAIN_TOLERANCE, TOLERANCE, relative_error
from xkv.config import XKVConfig
from xkv.ops.backend import Backend
from xkv.ops.loading import load_backend
from xkv.planning.language_model import LanguageModel, load_language_model
from xkv.tiny import make_document

LOGITS_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative L2 error of a step's logits, by the dtype that MLX computes in."""

PROMPT_TOKENS = 400
RANK = 64
FORMS: dict[str, dict[str, Any]] = {
    "every row": {"attention": "exact"},
    "working set": {"budget": 128},
}
"""Configurations to generate with."""


@dataclass(frozen=True)
class Line:
    """One comparison: what, in which dtype, who computed it and how, and how far it is off."""

    what: str
    dtype: str
    backend: str
    path: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def is_miss(self) -> bool:
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "MISS" if self.is_miss else "ok"
        return (
            f"{self.what:<25} {self.dtype:<9} {self.backend:<6} {self.path:<19} "
            f"{self.error:>8.1e} {self.tolerance:>9.0e}  {verdict} {self.detail}".rstrip()
        )


HEADER = f"{'what':<25} {'dtype':<9} {'on':<6} {'path':<19} {'error':>8} {'tolerance':>9}"


def compare_operations(backends: Sequence[Backend]) -> Iterator[Line]:
    """Compare with PyTorch's plain operations in float64 on the same rounded inputs."""
    reference = load_backend("torch", device="cpu", kernels="off")
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            wanted = []
            for case in PARITY_CASES:
                inputs = make_inputs(reference, case, dtype, exact=True)
                wanted.append(_numbers(reference, operation(reference, inputs, dtype)))
            for backend in backends:
                yield _compare(name, dtype, backend, wanted)


def _compare(name: str, dtype: str, backend: Backend, wanted: Sequence[np.ndarray]) -> Line:
    """The largest error of one operation on one backend."""
    backend.kernels.last_path.clear()
    error, detail = 0.0, ""
    for case, want in zip(PARITY_CASES, wanted, strict=True):
        got = OPERATIONS[name](backend, make_inputs(backend, case, dtype), dtype)
        try:
            error = max(error, relative_error(_numbers(backend, got), want))
        except ValueError as problem:
            error, detail = float("inf"), str(problem)
    path = backend.kernels.last_path.get(name, "plain")
    bounds = PLAIN_TOLERANCE if path == "plain" else TOLERANCE
    tolerance = 0.0 if name.startswith("quantize ") else bounds[dtype]
    return Line(name, dtype, backend.name, path, error, tolerance, detail)


def _numbers(backend: Backend, result: Any) -> np.ndarray:
    return result if isinstance(result, np.ndarray) else backend.to_numpy(result)


def compare_generation(model: str, max_tokens: int) -> Iterator[Line]:
    """Compare greedy steps out of a compressed cache: PyTorch chooses, MLX is asked the same."""
    torch_model, mlx_model = (load_language_model(name, model) for name in ("torch", "mlx"))
    document = make_document(seed=5, n_tokens=PROMPT_TOKENS)
    tokens = torch_model.context_tokens(document.text)
    tokens += torch_model.question_tokens(document.facts[1].question, "")
    backend = mlx_model.backend
    dtype = str(mlx_model.dtype).rsplit(".", 1)[-1]
    for form, options in FORMS.items():
        config = XKVConfig(rank_k=RANK, rank_v=RANK, window=24, **options)
        answer, want = _greedy_steps(torch_model, tokens, config, max_tokens)
        _, got = _greedy_steps(mlx_model, tokens, config, max_tokens, answer)
        path = backend.kernels.last_path.get("key_scores", "plain")
        error = relative_error(got, want)
        text = repr(torch_model.decode(answer))
        yield Line(f"{form}, logits", dtype, "mlx", path, error, LOGITS_TOLERANCE[dtype], text)
        # where the tokens differ: how much less the reference likes MLX's
        chosen = np.take_along_axis(want, got.argmax(-1)[:, None], -1)[:, 0]
        gap = float((want.max(-1) - chosen).max() / want.std())
        yield Line(f"{form}, tokens", dtype, "mlx", path, gap, LOGITS_TOLERANCE[dtype])


def _greedy_steps(
    model: LanguageModel,
    tokens: Sequence[int],
    config: XKVConfig,
    n_steps: int,
    answer: Sequence[int] | None = None,
) -> tuple[list[int], np.ndarray]:
    """The answer's tokens and each step's logits ``[n_steps, vocabulary]``.

    Args:
        answer: Tokens to feed instead of the best ones.
    """
    layers = list(model.make_cache(config).layers.values())
    model.forward([tokens[:-1]], layers, last_only=True)
    chosen, logits = [], []
    token = tokens[-1]
    for step in range(n_steps):
        row = model.backend.to_numpy(model.forward([[token]], layers, last_only=True))[0, -1]
        token = int(row.argmax()) if answer is None else answer[step]
        chosen.append(token)
        logits.append(row.astype(np.float64))
    return chosen, np.stack(logits)
