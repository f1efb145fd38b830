"""A model of mlx-lm as the evaluation uses it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.cli.engine import load_engine
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.calibration import MLXSubject
from xkv.backends.mlx_metal.model.enabled import plan_cache
from xkv.backends.mlx_metal.model.identity import model_fingerprint, model_name
from xkv.backends.mlx_metal.model.seam import attention_seam
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.types import Rope
from xkv.planning.document import DocumentLayer
from xkv.planning.language_model import LanguageModel
from xkv.planning.profile import ModelIdentity


class MLXLanguageModel(LanguageModel):
    """A model loaded by ``mlx_lm.load``; on the CPU it computes in float32.

    Args:
        model: A local directory or a Hugging Face repository.
        trust_remote_code: For the tokenizer.

    Raises:
        InputError: If it cannot be loaded, or a layer has no plain KV cache.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        on_gpu = mx.default_device() != mx.Device(mx.cpu)
        engine = load_engine(
            model, trust_remote_code=trust_remote_code, kernels="auto" if on_gpu else "off"
        )
        self._engine, self.model = engine, engine.model
        probes = plan_cache(self.model, XKVConfig()).probe.caches
        if len({probe.shape for probe in probes}) > 1 or any(
            probe.shape is None or probe.shape.is_mla or not probe.reaches_seam for probe in probes
        ):
            raise InputError(
                f"{model_name(self.model)} cannot be evaluated: all layers must have the same full "
                "KV cache, with attention that a cache can take over"
            )
        ropes = [probe.rope for probe in probes]
        kv_dtype = _kv_dtype(self.model, engine.backend, ropes)
        if not on_gpu:
            # the CPU multiplies 16-bit matrices slowly
            self.model.set_dtype(mx.float32)
        super().__init__(
            model,
            engine.backend,
            engine.tokenizer,
            ropes,
            kv_dtype,
            kv_dtype if on_gpu else mx.float32,
        )

    def forward(
        self, tokens: Sequence[Sequence[int]], layers: Sequence[Any], last_only: bool
    ) -> mx.array:
        logits = _forward(self.model, tokens, layers, self.ropes)
        return logits[:, -1:] if last_only else logits

    def subject(self, config: XKVConfig) -> MLXSubject:
        return MLXSubject.of(self.model, config, self.backend)

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)

    @property
    def identity(self) -> ModelIdentity:
        return self._engine.identity

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("mlx", "mlx-lm")}


def _forward(
    model: Any, tokens: Sequence[Sequence[int]], layers: Sequence[Any], ropes: Sequence[Rope | None]
) -> mx.array:
    caches = [XKVCache(layer, rope) for layer, rope in zip(layers, ropes, strict=True)]
    with attention_seam():
        return model(mx.array([list(row) for row in tokens]), cache=caches)


def _kv_dtype(model: Any, backend: MLXBackend, ropes: Sequence[Rope | None]) -> mx.Dtype:
    """In which a model makes its rows, read off a forward pass that is never computed."""
    layers = [DocumentLayer(backend) for _ in ropes]
    _forward(model, [[0]], layers, ropes)
    return layers[0].keys.dtype
