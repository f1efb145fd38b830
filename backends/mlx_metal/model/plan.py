"""What a model's ``config.json`` tells about memory: mlx-lm's model is built, never computed."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_flatten, tree_map_with_path

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enabled import plan_cache
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.footprint import CacheBytes, ModelFacts

utils = borrowed.module("mlx_lm.utils")
mlx_cache = borrowed.module("mlx_lm.models.cache")

KV_BITS = (8, 4)
KV_GROUP_SIZE = 64
"""mlx-lm's default of ``--kv-group-size``."""
SHORT, LONG = 64, 128
"""Tokens of the two lazy calls that show what grows."""

_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim", "dim", "block_dim")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length")
_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_DTYPES = {name: getattr(mx, name) for name in ("float16", "bfloat16", "float32")}

_Quantization = dict[str, Any]


def memory_bytes() -> int:
    """Bytes that Metal recommends to use at most, or the physical memory without Metal."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def read_facts(model: str, config: XKVConfig) -> ModelFacts:
    """Read what a model needs off its ``config.json``.

    Args:
        model: Directory with a ``config.json``, or a Hugging Face repository.
        config: How xKV would compress it.

    Raises:
        InputError: If there is no such file, or mlx-lm cannot build a model from it.
    """
    settings = _read_config(model)
    try:
        built, dtype = _build(settings)
        native, longer = (_call(built, n) for n in (SHORT, LONG))
    # unknown types, a config without a field or with a value of the wrong kind
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"mlx-lm cannot build {model}: {_first_line(error)}") from error
    caches = tuple(map(_measure, flatten(native), flatten(longer)))
    facts: dict[str, Any] = {}
    try:
        plan = plan_cache(built, config)
        kept = [x for x, probe in zip(caches, plan.probe.caches, strict=True) if not probe.shape]
        facts["config"], facts["natives"] = plan.config, tuple(kept)
        facts["shape"] = plan.probe.cache_shape(plan.groups)
        facts["why_not_layerwise"] = plan.probe.why_not_layerwise
    except InputError as error:
        facts["config"], facts["why_not_xkv"] = config, str(error)
    return ModelFacts(
        model_type=settings["model_type"],
        dtype=str(dtype).removeprefix("mlx.core."),
        item_bytes=dtype.size,
        weight_bytes=_tree_bytes(built.parameters()),
        hidden_size=_number(settings, _HIDDEN) or 0,
        layer_width=_layer_width(built, _number(settings, _EXPERTS) or 1),
        n_heads=_number(settings, _HEADS) or 0,
        max_tokens=_number(settings, _CONTEXT),
        caches=caches,
        quantized={bits: _quantized_caches(built, bits) for bits in KV_BITS},
        **facts,
    )


def _read_config(model: str) -> dict[str, Any]:
    folder = Path(model)
    try:
        if not folder.is_dir():
            folder = Path(hf_hub_download(model, "config.json")).parent
        elif not (folder / "config.json").is_file():
            raise InputError(f"{model} has no config.json, so it is not a model directory")
        config = utils.load_config(folder)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {model!r} is neither a directory nor a repository that can be reached: "
            f"{_first_line(error)}"
        ) from error
    except ValueError as error:
        raise InputError(f"{model}/config.json is not JSON: {_first_line(error)}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{model}/config.json names no model_type")
    if config.get("model_file") is not None:
        raise InputError(f"{model} brings code of its own, which is not run here")
    return config


def _build(config: dict[str, Any]) -> tuple[nn.Module, mx.Dtype]:
    """The model as it would be loaded, all of it lazy, and the dtype of its activations."""
    text = config.get("text_config") or {}
    names = (x.get(key) for x in (config, text) for key in ("dtype", "torch_dtype"))
    dtype = _DTYPES.get(next((name for name in names if name), "bfloat16"), mx.bfloat16)
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    keeps = getattr(model, "cast_predicate", lambda path: True)

    def cast(path: str, x: mx.array) -> mx.array:
        is_float = mx.issubdtype(x.dtype, mx.floating)
        return x.astype(dtype) if is_float and keeps(path) else x

    model.update(tree_map_with_path(cast, model.parameters()))
    own, foreign = config.get("quantization"), config.get("quantization_config")
    foreign = foreign or text.get("quantization_config")
    if own:
        _quantize(model, own, _mlx_predicate(model, own))
    elif foreign and foreign.get("quant_method") == "bitnet":
        model = borrowed.module("mlx_lm.models.bitlinear_layers").bitnet_quantize(model, foreign)
    elif foreign and (settings := _foreign_quantization(foreign)):
        _quantize(model, settings, _foreign_predicate(settings, foreign))
    return model.eval(), dtype


def _quantize(model: nn.Module, settings: _Quantization, predicate: Callable[..., Any]) -> None:
    mode = settings.get("mode", "affine")
    sizes = (settings["group_size"], settings["bits"])
    nn.quantize(model, *sizes, mode=mode, class_predicate=predicate)


def _mlx_predicate(model: nn.Module, settings: _Quantization) -> Callable[..., Any]:
    """Which layers ``mlx_lm.convert`` quantizes, and how."""
    chosen = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def predicate(path: str, module: nn.Module) -> Any:
        if path in settings:
            return settings[path]
        if not _fits(module, settings["group_size"]):
            return False
        return chosen(path, module)

    return predicate


def _foreign_predicate(settings: _Quantization, foreign: _Quantization) -> Callable[..., Any]:
    """Which layers other tools quantize: all linear ones but the head and those they name."""
    names = foreign.get("modules_to_not_convert") or foreign.get("ignore") or []

    def predicate(path: str, module: nn.Module) -> bool:
        is_left_out = isinstance(module, nn.Embedding) or path.endswith("lm_head")
        is_named = any(fnmatch.fnmatch(path, f"*{name}*") for name in names)
        return _fits(module, settings["group_size"]) and not is_left_out and not is_named

    return predicate


def _fits(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def _foreign_quantization(foreign: _Quantization) -> _Quantization | None:
    """How mlx-lm holds weights of other tools, None where it makes them 16-bit."""
    method = foreign.get("quant_method")
    if method == "compressed-tensors":
        # mlx-lm up to 0.31 takes every such checkpoint for one of 4 bits
        read = getattr(utils, "_compressed_tensors_quantization", None)
        return {"group_size": 32, "bits": 4} if read is None else read(foreign)
    if method in ("awq", "gptq"):
        return {"group_size": foreign["group_size"], "bits": foreign["bits"]}
    if method == "modelopt":
        return {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    is_mxfp8 = method == "fp8" and foreign.get("scale_fmt") == "ue8m0"
    if method in ("mxfp4", "mxfp8") or is_mxfp8:
        bits, mode = (4, "mxfp4") if method == "mxfp4" else (8, "mxfp8")
        return {"group_size": 32, "bits": bits, "mode": mode}
    return None


def _call(model: Any, n_tokens: int, caches: list[Any] | None = None) -> list[Any]:
    """A model's caches after a call that is not computed."""
    caches = caches or mlx_cache.make_prompt_cache(model)
    model(mx.zeros((1, n_tokens), dtype=mx.int32), cache=caches)
    return caches


def _measure(cache: Any, longer: Any) -> CacheBytes:
    """What a cache holds, from its state after ``SHORT`` and after ``LONG`` tokens."""
    if hasattr(cache, "keys"):
        if cache.keys is None:
            return CacheBytes()
        keys = cache.keys[0] if isinstance(cache.keys, tuple | list) else cache.keys
        # a cache may be filled several times in one call of the model
        row_bytes = cache.nbytes // keys.shape[-2] * (cache.offset // SHORT)
        window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        return CacheBytes(row_bytes, window)
    short, long = _tree_bytes(cache.state), _tree_bytes(longer.state)
    row_bytes = (long - short) // (LONG - SHORT)
    return CacheBytes(row_bytes, constant_bytes=short - SHORT * row_bytes)


def _quantized_caches(model: nn.Module, bits: int) -> tuple[CacheBytes, ...] | str:
    """mlx-lm's caches after ``--kv-bits``, or why it cannot run them."""
    try:
        ends = []
        for n_tokens in (SHORT, LONG):
            caches = _call(model, n_tokens - 1)
            before = [type(cache) for cache in caches]
            borrowed.module("mlx_lm.generate").maybe_quantize_kv_cache(
                caches, 0, KV_GROUP_SIZE, bits
            )
            if before == [type(cache) for cache in caches]:
                return "mlx-lm quantizes none of its caches"
            ends.append(_call(model, 1, caches))
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        sentence = _first_line(error).split(". ")[0]
        return f"mlx-lm cannot run it: {sentence}"
    return tuple(map(_measure, flatten(ends[0]), flatten(ends[1])))


def _layer_width(model: Any, n_experts: int) -> int:
    """Outputs of all linear layers of the widest decoder layer, active experts only."""
    widest = 0
    for layer in getattr(model, "layers", []):
        width = 0
        for _, module in layer.named_modules() if isinstance(layer, nn.Module) else []:
            weight = module.get("weight")
            if isinstance(weight, mx.array) and weight.ndim in (2, 3):
                width += weight.shape[-2] * (n_experts if weight.ndim == 3 else 1)
        widest = max(widest, width)
    return widest


def _tree_bytes(tree: Any) -> int:
    leaves: Any = tree_flatten(tree)
    return sum(x.nbytes for _, x in leaves if isinstance(x, mx.array))


def _number(config: dict[str, Any], names: Sequence[str]) -> int | None:
    """The first of these fields that is a number, in the config or its text part."""
    for part in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(part.get(name), int):
                return part[name]
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
