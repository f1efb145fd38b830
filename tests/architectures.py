"""Tiny random models of every architecture file of the installed mlx-lm."""

from __future__ import annotations

import copy
import importlib
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten

from tests.architecture_configs import CONFIGS


def _find_model_files() -> tuple[str, ...]:
    """Returns the names of the installed files that offer `Model` and `ModelArgs`."""
    # Either may be imported from another model file.
    names = [
        re.compile(rf"^(class {name}\b|from \.\w+ import .*\b{name}\b)", re.M)
        for name in ("Model", "ModelArgs")
    ]
    found = []
    for path in sorted((Path(mlx_lm.__file__).parent / "models").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if all(name.search(text) for name in names):
            found.append(path.stem)
    return tuple(found)


MODEL_FILES: tuple[str, ...] = _find_model_files()

NOT_BUILT: dict[str, str] = {
    "olmo": "Exits at import without hf_olmo, and fails on prompts by adding the mask 'causal'."
}


def _randomize(name: str, value: mx.array) -> mx.array:
    """Returns a random value for one parameter.

    Vectors (norms, biases, gates, time steps) stay near what the file chose; so does `A_log`,
    which sets how fast a state decays.

    Args:
        name: Path of the parameter in the model.
        value: The parameter as initialised.

    Returns:
        An array of the same shape and dtype.
    """
    if not mx.issubdtype(value.dtype, mx.floating):
        return mx.random.randint(0, 2 ** min(8 * value.dtype.size, 30), value.shape, value.dtype)
    noise = mx.random.normal(value.shape)
    if value.ndim < 2 or "A_log" in name:
        noise = value + 0.05 * noise
    elif name.endswith((".scales", ".biases")):
        noise = 0.05 * noise
    else:
        fan_in = math.prod(value.shape[1:]) if "conv" in name else value.shape[-1]
        noise = noise / math.sqrt(fan_in)
    return noise.astype(value.dtype)


def _qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    heads = mx.unflatten(qkvg[..., : (n_heads + n_kv_heads) * head_dim], -1, (-1, head_dim))
    queries, keys = mx.split(mx.fast.rms_norm(heads, None, eps), [n_heads], axis=-2)
    return queries * query_scale, keys


def _qk_norm_rope(qkvg, *, rope_base, offset, **norm):
    rope = nn.RoPE(norm["head_dim"], traditional=True, base=rope_base)
    return [rope(x.swapaxes(1, 2), offset).swapaxes(1, 2) for x in _qk_norm(qkvg, **norm)]


def _norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    weighted = branch if post_weight is None else post_weight * branch
    stream = alpha * stream + beta * mx.fast.rms_norm(weighted, None, post_eps)
    return stream, None if next_norm is None else next_norm(stream).astype(branch.dtype)


def _expert_routing(logits, bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    chosen = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return chosen, route_scale * weights / (weights.sum(axis=-1, keepdims=True) + score_eps)


def _post_expert_norm_combine(experts, weights, *, norm_weight, eps):
    normed = mx.fast.rms_norm(norm_weight * experts, None, eps)
    return (normed * weights[..., None]).sum(axis=-2).astype(experts.dtype)


def _rms_norm_sigmoid_gate(x, gate, *, eps):
    return mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).flatten(2) * mx.sigmoid(gate)


# What the Metal kernels that these files have no other path for compute; none touches a cache.
_WITHOUT_METAL: dict[str, dict[str, Any]] = {
    "bitnet": {"BitLinear": nn.Linear},
    "muse_spark": {
        "qk_norm": _qk_norm,
        "qk_norm_rope": _qk_norm_rope,
        "norm_add_norm": _norm_add_norm,
        "expert_routing": _expert_routing,
        "post_expert_norm_combine": _post_expert_norm_combine,
        "rms_norm_sigmoid_gate": _rms_norm_sigmoid_gate,
    },
}


def build(model_file: str, seed: int = 0) -> nn.Module:
    """Builds the tiny model of one architecture file with random weights.

    Args:
        model_file: A name of `CONFIGS`.
        seed: Seed of MLX's random generator.

    Returns:
        The model, evaluated and in eval mode.
    """
    module = importlib.import_module(f"mlx_lm.models.{model_file}")
    if not mx.metal.is_available():
        for name, stand_in in _WITHOUT_METAL.get(model_file, {}).items():
            setattr(module, name, stand_in)
    args = module.ModelArgs.from_dict(copy.deepcopy(CONFIGS[model_file]))
    mx.random.seed(seed)
    model = module.Model(args)
    if model_file == "phi3small":
        # It sets the logits of fixed ids, far beyond this vocabulary, to -inf.
        model._dummy_tokenizer_ids = model._dummy_tokenizer_ids[:0]
    weights = sorted(tree_flatten(model.parameters()))
    model.update(tree_unflatten([(name, _randomize(name, w)) for name, w in weights]))
    mx.eval(model.parameters())
    return model.eval()
