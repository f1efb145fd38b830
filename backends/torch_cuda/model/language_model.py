"""A model of transformers as the evaluation uses it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers.cache_utils import Cache

from xkv.backends.torch_cuda.model.attention import xkv_attention
from xkv.backends.torch_cuda.model.cache import plan_cache
from xkv.backends.torch_cuda.model.cache_layer import XKVLayer
from xkv.backends.torch_cuda.model.calibration import TorchSubject
from xkv.backends.torch_cuda.model.engine import load_engine
from xkv.backends.torch_cuda.model.fingerprint import model_fingerprint
from xkv.backends.torch_cuda.model.probe import cache_argument
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.language_model import LanguageModel
from xkv.planning.profile import ModelIdentity


class TorchLanguageModel(LanguageModel):
    """A model loaded by ``AutoModelForCausalLM``; on the CPU it computes in float32.

    Args:
        model: A local directory or a Hugging Face repository.
        trust_remote_code: For the tokenizer.

    Raises:
        InputError: If it cannot be loaded, or a layer has no plain KV cache.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        engine = load_engine(model, trust_remote_code=trust_remote_code)
        self._engine, self.model = engine, engine.model
        kv_dtype = self.model.dtype
        if engine.backend.device.type == "cpu":
            # the CPU multiplies 16-bit matrices slowly
            self.model = self.model.float()
        probes = plan_cache(self.model, XKVConfig()).probe.caches
        if len({probe.shape for probe in probes}) > 1 or any(
            probe.shape is None or not probe.reaches_seam for probe in probes
        ):
            raise InputError(
                f"{type(self.model).__name__} cannot be evaluated: all layers must have the same "
                "full KV cache, with attention that a cache can take over"
            )
        ropes = [probe.rope for probe in probes]
        super().__init__(model, engine.backend, engine.tokenizer, ropes, kv_dtype, self.model.dtype)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[Sequence[int]], layers: Sequence[Any], last_only: bool
    ) -> torch.Tensor:
        cache = Cache(
            layers=[XKVLayer([layer], rope) for layer, rope in zip(layers, self.ropes, strict=True)]
        )
        with xkv_attention(self.model):
            return self.model(
                input_ids=torch.tensor(tokens, device=self.model.device),
                use_cache=True,
                logits_to_keep=1 if last_only else 0,
                **{cache_argument(self.model): cache},
            ).logits

    def subject(self, config: XKVConfig) -> TorchSubject:
        return TorchSubject(self.model, config, self._engine.backend)

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self._engine.end_tokens())

    @property
    def identity(self) -> ModelIdentity:
        return self._engine.identity

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}
