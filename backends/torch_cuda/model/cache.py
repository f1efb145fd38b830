"""The low-rank cache as transformers' models expect a cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import ATTENTION, install
from xkv.backends.torch_cuda.model.cache_layer import Padding, XKVLayer
from xkv.backends.torch_cuda.model.probe import base_model, native_layers, probe_model
from xkv.cache.fingerprint import fingerprint
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.cache_plan import CachePlan
from xkv.planning.profile import ModelIdentity
from xkv.planning.report import Report
from xkv.store.weighting import find_projection, output_energy

logger = logging.getLogger("xkv")


class XKVCache(Cache):
    """A compressed cache for ``model(...)`` and ``model.generate``; see :func:`xkv.torch_cache`.

    Args:
        model_config: Of the model whose rows it will hold.
        plan: What becomes of each layer.
        backend: Does the arithmetic.
        on_progress: Called with (factorizations done, factorizations in all) after each.
        sequences: One low-rank cache for the batch or one a sequence; None makes an empty one.
        output_energies: :func:`xkv.store.weighting.output_energy` by layer.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        plan: CachePlan,
        backend: TorchBackend,
        on_progress: Callable[[int, int], None] | None = None,
        sequences: Sequence[LowRankCache] | None = None,
        output_energies: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self.plan = plan
        self._output_energies = output_energies
        self.backend = backend
        self._model_config = model_config
        self._on_progress = on_progress
        self.padding = Padding()
        self.sequences = list(sequences or [self._new_sequence()])
        """The low-rank caches, one for the batch or, where rows are padding, one a sequence."""
        super().__init__(layers=self._new_layers())

    def _new_sequence(self) -> LowRankCache:
        return self.plan.lowrank_cache(self.backend, self._on_progress, self._output_energies)

    def _new_layers(self) -> list[Any]:
        probes = self.plan.probe.caches
        return [
            XKVLayer(
                [cache.layers[i] for cache in self.sequences],
                probes[i].rope,
                not probes[i].reaches_seam,
                self.padding,
            )
            if i in self.sequences[0].layers
            else native
            for i, native in enumerate(native_layers(self._model_config))
        ]

    def reset(self) -> None:
        """Forget everything."""
        whole = self.sequences[0]
        self.padding, self.sequences = Padding(), [self._new_sequence()]
        self.sequences[0].fingerprint = whole.fingerprint
        self.layers = self._new_layers()

    def stream(self) -> None:
        """From now on compress a prompt while it streams in, not when it is complete."""
        for cache in self.sequences:
            cache.is_streaming = True

    @property
    def report(self) -> Report:
        """What becomes of each layer; print it."""
        return self.plan.report()

    def begin(self, mask: torch.Tensor | None, batch: int, n_rows: int) -> torch.Tensor | None:
        """Note which of a call's rows are tokens, before its layers run.

        Args:
            mask: ``[B, L]``, 0 where a row is padding; the last ``n_rows`` are the call's.
            batch: Sequences.
            n_rows: Rows of the call.

        Returns:
            The mask of all rows seen and new ones, None if none is padding.
        """
        padding = self.padding
        if mask is not None and mask.ndim != 2:
            raise InputError(
                f"an attention mask of shape {tuple(mask.shape)} is not supported by a compressed "
                "cache: give one of shape [batch, tokens], or none"
            )
        # a single row is a token just chosen: to look at its mask would wait for the device
        is_token = None if mask is None or n_rows == 1 else mask[:, -n_rows:].bool()
        if padding.is_token is None and (is_token is None or bool(is_token.all())):
            return None
        if padding.is_token is None:
            self._split(batch)
        if is_token is None:
            is_token = torch.ones(batch, n_rows, dtype=torch.bool, device=self.backend.device)
        padding.begin(is_token, self.get_seq_length())
        return padding.is_token

    def _split(self, batch: int) -> None:
        """From now on keep each sequence by itself, as it would be alone."""
        layers = {i: x for i, x in enumerate(self.layers) if isinstance(x, XKVLayer)}
        if any(layer.parts[0].is_compressed for layer in layers.values()):
            raise InputError(
                "a batch whose prompts were compressed together cannot have padding in a later "
                "turn: begin with a new cache"
            )
        whole = self.sequences[0]
        self.sequences = [self._new_sequence() for _ in range(batch)]
        for cache in self.sequences:
            cache.fingerprint, cache.is_streaming = whole.fingerprint, whole.is_streaming
        for i, layer in layers.items():
            old, layer.parts = layer.parts[0], [cache.layers[i] for cache in self.sequences]
            for row, part in enumerate(layer.parts if old.offset else []):
                rows = old.rows
                keys, values = (x.rows[row : row + 1] for x in (rows.keys, rows.values))
                part.append(keys, values, rows.rope_runs[-1].spec)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.padding.is_token is not None and tokens_to_remove:
            self.padding.is_token = self.padding.is_token[:, :tokens_to_remove]

    @property
    def notice(self) -> str | None:
        """What was not done as asked, in a sentence."""
        return self.sequences[0].notice

    @property
    def factorize_seconds(self) -> float:
        return sum(cache.factorize_seconds for cache in self.sequences)

    def _native_bytes(self) -> int:
        native = [layer for layer in self.layers if not isinstance(layer, XKVLayer)]
        rows = [getattr(layer, name, None) for layer in native for name in ("keys", "values")]
        return sum(x.nbytes for x in rows if x is not None)

    def dense_bytes(self) -> int:
        """What the tokens take in the full cache."""
        return self._native_bytes() + sum(cache.dense_bytes() for cache in self.sequences)

    def held_bytes(self) -> int:
        """What they take here, by the sizes of all arrays."""
        return self._native_bytes() + sum(cache.held_bytes() for cache in self.sequences)


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """What a profile of a model agrees with."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return ModelIdentity(
        model.config.model_type,
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim,
        head_dim,
    )


def torch_cache(
    model: PreTrainedModel,
    config: XKVConfig | None = None,
    *,
    backend: TorchBackend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> XKVCache:
    """An empty compressed cache for a model; see :func:`xkv.torch_cache`.

    Args:
        model: A decoder of transformers.
        config: Defaults to a compression of 4.
        backend: Defaults to one on the model's device.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Raises:
        InputError: If nothing of the model can be compressed, or its attention not be replaced.
    """
    plan = plan_cache(model, config or XKVConfig())
    for sentence in plan.report().warnings():
        logger.warning(sentence)
    install(model)
    watch_calls(model)
    backend = backend or TorchBackend(model.device)
    energies = output_energies(backend, model, plan)
    cache = XKVCache(model.config, plan, backend, on_progress, output_energies=energies)
    cache.sequences[0].fingerprint = model_fingerprint(model)
    return cache


def output_energies(
    backend: TorchBackend, model: PreTrainedModel, plan: CachePlan
) -> dict[int, torch.Tensor]:
    """:func:`xkv.store.weighting.output_energy` of compressed layers whose projection is known."""
    found: dict[int, torch.Tensor] = {}
    if plan.config.weighting != "attention":
        return found
    layers = getattr(base_model(model), "layers", [])
    for index in (i for group in plan.groups for i in group if i < len(layers)):
        module, shape = (
            find_projection(layers[index].named_modules()),
            plan.probe.caches[index].shape,
        )
        if module is not None and shape is not None:
            weight = getattr(module.weight, "to_local", lambda w=module.weight: w)().detach()
            energy = output_energy(backend, weight, shape.n_kv_heads, shape.value_dim)
            if energy is not None:
                found[index] = energy
    return found


def model_fingerprint(model: PreTrainedModel) -> str:
    """What a file says of the model that made its rows; of a sharded one, its rank's shard."""
    parameters = {
        name: getattr(x, "to_local", lambda x=x: x)().detach()
        for name, x in model.named_parameters()
    }
    return fingerprint(
        ((name, tuple(x.shape)) for name, x in parameters.items()),
        lambda name, n: parameters[name].reshape(-1)[:n].float().cpu().numpy(),
    )


def plan_cache(model: PreTrainedModel, config: XKVConfig) -> CachePlan:
    """Look at a model, and decide what becomes of each of its layers' caches."""
    return CachePlan.of_probe(type(model).__name__, config, probe_model(model))


def watch_calls(model: PreTrainedModel) -> None:
    """Tell a cache of ours of each call of its model, before the layers run."""
    base = base_model(model)
    if _before_call not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_before_call, with_kwargs=True)


def _before_call(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
    cache = given.get("cache", given.get("past_key_values"))
    if not isinstance(cache, XKVCache):
        return None
    if not base.config._attn_implementation.startswith(ATTENTION):
        raise InputError(
            f"the model's attention was set to {base.config._attn_implementation!r} since "
            "torch_cache was called, and only 'xkv' can attend to a compressed cache"
        )
    inputs = given.get("input_ids")
    batch, n_rows = (given["inputs_embeds"] if inputs is None else inputs).shape[:2]
    return (), given | {"attention_mask": cache.begin(given.get("attention_mask"), batch, n_rows)}
