"""Caches to measure fidelity on: synthetic groups of layers, and the bundled model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from xkv.cache.lowrank_cache import LowRankCache
from xkv.evaluation.tasks import TASKS
from xkv.ops.backend import Backend
from xkv.ops.types import RopeSpec
from xkv.planning.document import Document
from xkv.planning.grouping import make_groups
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR

N_LAYERS, N_KV_HEADS, HEAD_DIM = 4, 8, 128
WIDTH = N_LAYERS * N_KV_HEADS * HEAD_DIM
N_QUERIES = 16

SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exponential": lambda i: np.exp(-i / 160) + 1e-3,
    "power law": lambda i: (1 + i / 8) ** -0.9,
    "knee": lambda i: np.where(i < 256, 1.0, 0.03),
}
"""Singular values of the joint matrix by index."""


def spread_columns(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Multiply rows by a random orthogonal matrix: signs, then a fast Hadamard transform, twice."""
    for sign in signs:
        x = x * sign
        size = 1
        while size < x.shape[-1]:
            pairs = x.reshape(len(x), -1, 2, size)
            x = np.concatenate(
                [pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], 2
            )
            x = x.reshape(len(x), -1)
            size *= 2
        x /= np.sqrt(np.float32(x.shape[-1]))
    return x


def synthetic_document(backend: Backend, family: str, n_tokens: int) -> Document:
    """A group of layers whose joint keys and joint values have a family's spectrum."""
    generator = np.random.default_rng(0)
    values_of = SPECTRA[family](np.arange(WIDTH)).astype(np.float32)
    rope = RopeSpec.standard(HEAD_DIM, 500_000.0)
    xp = backend.xp
    tensors = []
    for _ in range(2):
        signs = generator.choice(np.float32([-1, 1]), (2, WIDTH))
        rows = np.empty((n_tokens, WIDTH), np.float16)
        for start in range(0, n_tokens, 2048):
            draw = generator.standard_normal((min(2048, n_tokens - start), WIDTH), np.float32)
            rows[start : start + 2048] = spread_columns(draw * values_of, signs)
        rows *= np.float16(1 / rows[:2048].astype(np.float32).std())
        layers = rows.reshape(n_tokens, N_LAYERS, N_KV_HEADS, HEAD_DIM).transpose(1, 2, 0, 3)
        tensors.append([np.ascontiguousarray(layer[None]) for layer in layers])
    wanted = generator.integers(4, n_tokens - 200, (N_LAYERS, N_KV_HEADS, N_QUERIES))
    keys, queries = [], []
    for layer, rows in zip(wanted, tensors[0], strict=True):
        keys.append(backend.rope(backend.from_numpy(rows), 0, rope))
        found = backend.to_numpy(keys[-1]).astype(np.float32)
        aims = np.take_along_axis(found, layer[None, :, :, None], axis=2)
        noise = generator.standard_normal(aims.shape, np.float32)
        # a score of about 16 for the token that is looked for, and of about 1.5 for the others
        queries.append(backend.from_numpy(1.4 * aims + 0.7 * noise))
    return Document(
        backend,
        tuple(keys),
        tuple(backend.from_numpy(rows) for rows in tensors[1]),
        tuple(queries),
        (rope,) * N_LAYERS,
        (n_tokens,),
        HEAD_DIM**-0.5,
        xp.float32,
        0,
        lambda config: LowRankCache(backend, config, make_groups(config, N_LAYERS)),
    )


def bundled_documents(backend: str, n_documents: int) -> Iterator[Document]:
    """Documents of the evaluation's tasks, read by the bundled model."""
    model = load_language_model(backend, str(CHECKPOINT_DIR))
    tasks = ("needle", "multikey", "multivalue", "multiquery", "variables", "qa")
    for number in range(n_documents):
        sample = TASKS[tasks[number % len(tasks)]](2_000_000 + number, 4096, model.count)
        yield model.prefill(model.context_tokens(sample.context), 0)
