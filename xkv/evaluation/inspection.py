"""What a prompt's cache looks like, and what compression makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xkv.cache.lowrank_cache import LowRankCache
from xkv.checks.page import error_rows
from xkv.checks.plots import captions_of
from xkv.cli.terminal import size_text
from xkv.config import XKVConfig
from xkv.evaluation.methods.lowrank import compressed_cache
from xkv.evaluation.working_set import watch
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import Document
from xkv.planning.language_model import LanguageModel
from xkv.planning.layer_groups import prompt_tokens
from xkv.planning.similarity import cka

TENSORS = ("keys", "values")

STEPS = 32
"""Tokens that are decoded to see which rows their steps rebuild."""

OPENING = 200
"""Characters of the prompt that are shown."""


def inspect(
    model: LanguageModel, text: str, config: XKVConfig, n_steps: int = STEPS
) -> dict[str, Any]:
    """Everything that is plotted, ready for JSON.

    Args:
        model: The model.
        text: The prompt.
        config: How it is compressed; only rows that are compressed are looked at.
        n_steps: Tokens to decode after it, at least 1.

    Raises:
        InputError: If the prompt is too short, or its rows hold NaN or infinity.
    """
    document = model.prefill(prompt_tokens(model, text), seed=0)
    n_layers = len(document.keys)
    plain = {
        tensor: [document.plain_rows(tensor, layer) for layer in range(n_layers)]
        for tensor in TENSORS
    }
    cache = compressed_cache(document, config)
    start = cache.groups[0].start
    rows = slice(start, start + cache.groups[0].layers[0].n_segment)
    plain = {tensor: [layer[rows] for layer in layers] for tensor, layers in plain.items()}
    report = _facts(model, document, cache) | {
        "prompt": text[:OPENING],
        "config": asdict(config),
        "similarity": {
            tensor: cka(document.backend, plain[tensor]).round(6).tolist() for tensor in TENSORS
        },
        "spectra": [
            _spectrum(document, cache, number, tensor, plain[tensor])
            for number in range(len(cache.groups))
            for tensor in TENSORS
        ],
        "errors": {tensor: _errors(document, cache, tensor, rows) for tensor in TENSORS},
        "bands": band_plan(cache),
    }
    # last: the cache grows
    report["working_set"] = watch(model, document, cache, n_steps)
    return report | {"captions": captions_of(report)}


def _facts(model: LanguageModel, document: Document, cache: LowRankCache) -> dict[str, Any]:
    """What is held of what."""
    dense = [layer for layer in range(len(document.keys)) if layer not in cache.layers]
    held = cache.held_bytes()
    held += sum(document.keys[i].nbytes + document.values[i].nbytes for i in dense)
    group = cache.groups[0]
    return {
        "model": str(model.identity),
        "backend": document.backend.name,
        "versions": model.versions,
        "n_tokens": document.n_tokens,
        "n_sinks": group.start,
        "n_compressed": group.layers[0].n_segment,
        "is_model_basis": all(x.basis.is_shared for x in group.state.stores),
        "groups": [list(layers) for layers in cache.indices],
        "dense_bytes": document.dense_bytes,
        "held_bytes": held,
    }


@dataclass(frozen=True)
class JointSpectrum:
    """The keys, or the values, of one group of layers.

    Args:
        energies: Squared singular values of the layers side by side, falling, float64.
        width: Columns of all layers side by side.
    """

    energies: np.ndarray
    width: int

    @classmethod
    def of(cls, backend: Backend, layers: Sequence[Array]) -> JointSpectrum:
        """Measure a group.

        Args:
            layers: One array per layer, ``[L, width]``, any float dtype.
        """
        xp = backend.xp
        dtype = backend.accumulate_dtype(layers[0])
        rows = xp.concat([xp.astype(layer, dtype) for layer in layers], axis=-1)
        n_rows, width = rows.shape
        across = xp.matrix_transpose(rows)
        gram = across @ rows if width <= n_rows else rows @ across
        # only the values: a backend's eigh would compute the vectors too
        energies = np.linalg.eigvalsh(backend.to_numpy(gram).astype(np.float64))
        energies = np.clip(energies[::-1], 0, None)
        return cls(energies, width)

    @property
    def singular_values(self) -> np.ndarray:
        """Falling, float64."""
        return np.sqrt(self.energies)

    def left_out(self) -> np.ndarray:
        """Relative error of the best factors of each rank from 0 on."""
        rest = np.append(np.cumsum(self.energies[::-1])[::-1], 0.0)
        return np.sqrt(rest / rest[0]) if rest[0] else rest


def _spectrum(
    document: Document, cache: LowRankCache, number: int, tensor: str, plain: Sequence[Any]
) -> dict[str, Any]:
    """One group's layers side by side, and each alone."""
    layers = cache.indices[number]
    joint = JointSpectrum.of(document.backend, [plain[i] for i in layers])
    single = [JointSpectrum.of(document.backend, [plain[i]]) for i in layers]
    store = getattr(cache.groups[number], tensor)
    n_rows, energy = plain[0].shape[0], joint.energies.sum()
    left = np.array([x.left_out() ** 2 * x.energies.sum() for x in single]).sum(0)
    return {
        "group": number,
        "layers": list(layers),
        "tensor": tensor,
        "rank": store.latent.rank,
        "joint": _short(joint.singular_values),
        "single": [_short(x.singular_values) for x in single],
        "joint_curve": _curve(joint.left_out(), n_rows, joint.width),
        "single_curve": _curve(np.sqrt(left / max(energy, 1e-30)), n_rows, single[0].width),
    }


def _curve(error: np.ndarray, n_rows: int, width: int) -> dict[str, list[float]]:
    """Relative error by rank, and what such factors take."""
    share = np.arange(len(error)) * (n_rows + width) / (n_rows * width)
    return {"share_of_dense": _short(share), "error": _short(error)}


def _short(numbers: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in numbers]


def _errors(
    document: Document, cache: LowRankCache, tensor: str, rows: slice
) -> list[float | None]:
    """Relative error of each layer's compressed rows; None for a layer that stays dense."""
    backend = document.backend
    found: list[float | None] = []
    for layer, exact in enumerate(getattr(document, tensor)):
        if layer not in cache.layers:
            found.append(None)
            continue
        approximate = cache.layers[layer].dense()[TENSORS.index(tensor)]
        got, want = (
            backend.to_numpy(x[..., rows, :]).astype(np.float64) for x in (approximate, exact)
        )
        norm = np.linalg.norm(want)
        found.append(float(np.linalg.norm(got - want) / norm) if norm else 0.0)
    return found


def band_plan(cache: LowRankCache) -> list[dict[str, Any]]:
    """The bits of every latent and basis of a compressed cache, band by band.

    Returns:
        For each band its ``group``, ``tensor`` ("keys" or "values"), ``first_column``,
        ``n_columns``, ``latent_bits`` and ``basis_bits``.
    """
    bands = []
    for number, group in enumerate(cache.groups):
        for tensor in TENSORS:
            store, first = getattr(group, tensor), 0
            for width, latent_bits, basis_bits in store.parts():
                bands.append(
                    {
                        "group": number,
                        "tensor": tensor,
                        "first_column": first,
                        "n_columns": width,
                        "latent_bits": latent_bits,
                        "basis_bits": basis_bits,
                    }
                )
                first += width
    return bands


def report_lines(report: dict[str, Any]) -> list[str]:
    """The numbers for people, as Markdown."""
    dense, held = report["dense_bytes"], report["held_bytes"]
    lines = [
        f"{report['model']}, {report['n_tokens']} tokens: {size_text(dense)} dense, "
        f"{size_text(held)} held ({dense / held:.2f} x)",
        "",
        "| layer | group | error of keys | error of values |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {' | '.join(row)} |" for row in error_rows(report)]
    for name, caption in report["captions"].items():
        lines += ["", f"**{name}.png**: {caption}"]
    return lines
