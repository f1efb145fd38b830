"""A model of mlx-lm as the evaluation uses it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from xkv.backends.mlx_metal.cache import XKVCache
from xkv.backends.mlx_metal.enable import CachePlan, model_name
from xkv.backends.mlx_metal.engine import load_engine
from xkv.backends.mlx_metal.seam import attention_seam
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation.model import LanguageModel


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
        self.model = engine.model
        probes = CachePlan.of(self.model, XKVConfig()).probe.caches
        if len({probe.shape for probe in probes}) > 1 or any(
            probe.shape is None or probe.shape.is_mla or not probe.reaches_seam for probe in probes
        ):
            raise InputError(
                f"{model_name(self.model)} cannot be evaluated: all layers must have the same full "
                "KV cache, with attention that a cache can take over"
            )
        parameters: Any = tree_flatten(self.model.parameters())
        kv_dtype = next(
            x.dtype
            for name, x in parameters
            if name.endswith(("norm.weight", ".scales", "embed_tokens.weight"))
        )
        if not on_gpu:
            # the CPU multiplies 16-bit matrices slowly
            self.model.set_dtype(mx.float32)
        super().__init__(
            model,
            engine.backend,
            engine.tokenizer,
            [probe.rope for probe in probes],
            kv_dtype,
            kv_dtype if on_gpu else mx.float32,
        )

    def forward(
        self, tokens: Sequence[Sequence[int]], layers: Sequence[Any], last_only: bool
    ) -> mx.array:
        caches = [XKVCache(layer, rope) for layer, rope in zip(layers, self.ropes, strict=True)]
        with attention_seam():
            logits = self.model(mx.array([list(row) for row in tokens]), cache=caches)
        return logits[:, -1:] if last_only else logits

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("mlx", "mlx-lm")}
