"""One group's factorization beside PyTorch's: time and error on the same rows."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from xkv.ops.backend import Backend
from xkv.store.svd import factorize


@torch.inference_mode()
def compare_factorizations(
    backend: Backend, layers: list[torch.Tensor], rank: int, n_runs: int
) -> list[dict[str, Any]]:
    """Ours, the full SVD and PyTorch's randomized one, each after a warm-up.

    Args:
        backend: Does ours.
        layers: One a layer, ``[L, n_kv_heads, head_dim]`` float32.
        rank: Columns to keep.
        n_runs: Timed runs of each, at least two.

    Returns:
        For each method its median time with the middle half, its relative error, and by what share
        that exceeds the exact truncation's.
    """
    joint = torch.cat([layer.flatten(1) for layer in layers], dim=1)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        latent, bases, _ = factorize(backend, layers, rank)
        return latent, torch.cat([basis.flatten(1) for basis in bases], dim=1)

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.linalg.svd(joint, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]

    def randomized() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, v = torch.svd_lowrank(joint, q=rank + 4, niter=4)
        return u[:, :rank] * s[:rank], v[:, :rank].mT

    methods = {"xkv": ours, "torch.linalg.svd": full, "torch.svd_lowrank": randomized}
    times: dict[str, list[float]] = {name: [] for name in methods}
    errors = {}
    for run in range(1 + n_runs):
        for name, method in methods.items():
            backend.evaluate()
            began = time.perf_counter()
            latent, basis = method()
            backend.evaluate()
            if run:
                times[name].append(time.perf_counter() - began)
            errors[name] = float((latent @ basis - joint).norm() / joint.norm())
    found = []
    for name in methods:
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        found.append(
            {
                "method": name,
                "tokens": len(joint),
                "rank": rank,
                "seconds": median,
                "low_s": low,
                "high_s": high,
                "error": errors[name],
                "over_exact": errors[name] / errors["torch.linalg.svd"] - 1,
            }
        )
    return found
