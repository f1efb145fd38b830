"""A model of transformers as calibration uses it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import xkv_attention
from xkv.backends.torch_cuda.model.calls import watch_calls
from xkv.backends.torch_cuda.model.fingerprint import model_fingerprint
from xkv.backends.torch_cuda.model.prefill import STEP_SIZE, prefill
from xkv.backends.torch_cuda.model.probe import base_model, cache_argument, probe_model
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.planning.cache_plan import CachePlan


class TorchSubject:
    """See :class:`xkv.planning.calibration.Subject`.

    Args:
        model: A decoder of transformers.
        config: Says which layers share a basis.
        backend: On the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: XKVConfig,
        backend: TorchBackend,
    ) -> None:
        self.model, self.backend = model, backend
        self.plan = CachePlan.of_probe(type(model).__name__, config, probe_model(model))
        self.fingerprint = model_fingerprint(model)

    @contextlib.contextmanager
    def at_full_speed(self) -> Iterator[None]:
        """A CPU multiplies 16-bit matrices slowly: there the weights are in float32 inside."""
        is_cpu, short = self.backend.device.type == "cpu", (torch.float16, torch.bfloat16)
        narrow = {x: x.dtype for x in self.model.parameters() if is_cpu and x.dtype in short}
        for weight in narrow:
            weight.data = weight.data.float()
        try:
            yield
        finally:
            for weight, dtype in narrow.items():
                weight.data = weight.data.to(dtype)

    def fill(self, cache: LowRankCache, tokens: Sequence[int]) -> XKVCache:
        caches = XKVCache(self.model.config, self.plan, self.backend, sequences=[cache])
        with xkv_attention(self.model):
            watch_calls(self.model)
            # the last token stays out, as of a prompt
            prefill(self.model, caches, self._batch([*tokens, tokens[-1]]), step_size=STEP_SIZE)
        return caches

    @torch.no_grad()
    def log_probabilities(self, caches: XKVCache, tokens: Sequence[int]) -> np.ndarray:
        twin = copy.deepcopy(caches)
        with xkv_attention(self.model):
            logits = self.model(self._batch(tokens), **{cache_argument(self.model): twin}).logits
        return torch.log_softmax(logits[0].float(), -1).cpu().numpy()

    def gradients(
        self, tokens: Sequence[int], n_context: int, seed: int
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        argument = cache_argument(self.model)
        cache = DynamicCache(config=self.model.config)
        needs_gradients = [x for x in self.model.parameters() if x.requires_grad]
        try:
            for parameter in needs_gradients:
                parameter.requires_grad_(False)
            with torch.no_grad():
                base_model(self.model)(self._batch(tokens[:n_context]), **{argument: cache})
            layers: dict[int, Any] = {
                i: cache.layers[i] for group in self.plan.groups for i in group
            }
            for layer in layers.values():
                layer.keys, layer.values = (
                    x.detach().clone().requires_grad_() for x in (layer.keys, layer.values)
                )
            leaves = {i: (layer.keys, layer.values) for i, layer in layers.items()}
            with torch.enable_grad():
                logits = self.model(self._batch(tokens[n_context:]), **{argument: cache}).logits
                chosen = torch.log_softmax(logits[0].float(), -1)
                _sampled(chosen, seed).backward()
        finally:
            for parameter in needs_gradients:
                parameter.requires_grad_(True)
        return {i: (keys.grad, values.grad) for i, (keys, values) in leaves.items()}

    def _batch(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)


def _sampled(log_probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    """Log probabilities of tokens drawn from their own distribution, summed with random signs.

    The squares of its gradient are, in the mean, the diagonal of the Fisher information.
    """
    random = np.random.default_rng(seed)
    noise, signs = (
        torch.from_numpy(x.astype(np.float32)).to(log_probabilities.device)
        for x in (
            random.gumbel(size=tuple(log_probabilities.shape)),
            random.choice([-1.0, 1.0], size=len(log_probabilities)),
        )
    )
    drawn = (log_probabilities.detach() + noise).argmax(-1, keepdim=True)
    total: Any = (log_probabilities.gather(1, drawn)[:, 0] * signs).sum()
    return total
