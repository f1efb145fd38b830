"""Prompt caches of one model are not taken for another one's, adapters included."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import xkv
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError
from xkv.backends.mlx_metal.model.identity import model_fingerprint
from xkv.cache.fingerprint import N_VALUES, fingerprint, sampled, stride

OPTIONS = {"rank_k": 24, "rank_v": 32, "group_size": 2, "window": 16}
PROMPT = np.random.default_rng(0).integers(300, 1000, 100).tolist()
ALL = ["self_attn.q_proj", "self_attn.v_proj"]
KINDS = {
    "all layers": {"n_layers": 5, "keys": ALL},
    "last layer": {"n_layers": 1, "keys": ["self_attn.q_proj"]},
    "mlp": {"n_layers": 2, "keys": ["mlp.down_proj"]},
    "dora": {"n_layers": 5, "keys": ALL, "use_dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])


def adapted(folder, seed, n_layers=5, keys=ALL, use_dora=False, scale=20.0):
    """A model with an adapter of its own."""
    model = mlx_lm.load(str(folder))[0]
    model.freeze()
    settings = {"rank": 4, "scale": scale, "dropout": 0.0, "keys": keys}
    mx.random.seed(seed)
    linear_to_lora_layers(model, n_layers, settings, use_dora=use_dora)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.05
    return model.eval()


def fuse(model):
    """The adapter in the weights, as ``mlx_lm.fuse`` does it."""
    fused = [(name, x.fuse()) for name, x in model.named_modules() if hasattr(x, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return model


@pytest.mark.parametrize("is_fused", [False, True], ids=["adapter", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_told_apart(folder, kind, is_fused):
    models = [adapted(folder, seed, **KINDS[kind]) for seed in (1, 1, 2)]
    if is_fused:
        models = [fuse(model) for model in models]
    first, again, other = map(model_fingerprint, models)
    assert first == again != other
    assert model_fingerprint(mlx_lm.load(str(folder))[0]) not in (first, other)


def test_strength_of_an_adapter_counts(folder):
    weak, strong = (adapted(folder, 1, scale=scale) for scale in (1.0, 20.0))
    names = [[name for name, _ in tree_flatten(model.parameters())] for model in (weak, strong)]
    assert names[0] == names[1]
    assert model_fingerprint(weak) != model_fingerprint(strong)


def test_numbers_anywhere_in_a_matrix_count(folder):
    """The first rows may be padding, and equal in all models."""
    model = mlx_lm.load(str(folder))[0]
    before = model_fingerprint(model)
    weight = model.layers[2].self_attn.k_proj.weight
    half = weight.shape[0] // 2
    model.layers[2].self_attn.k_proj.weight = mx.concatenate([weight[:half], weight[half:] * 2])
    assert model_fingerprint(model) != before


def test_cache_file_of_another_adapter_is_refused(folder, tmp_path):
    file = str(tmp_path / "cache.safetensors")
    first, other = (adapted(folder, seed) for seed in (1, 2))
    for model in (first, other):
        xkv.enable(model, **OPTIONS)
    cache = make_prompt_cache(first)
    tokens(first, cache, PROMPT)
    xkv.save_prompt_cache(file, cache)
    assert tokens(first, xkv.load_prompt_cache(file), PROMPT[:5])
    with pytest.raises(InputError, match="made by another model"):
        tokens(other, xkv.load_prompt_cache(file), PROMPT[:5])
    for model in (first, other):
        xkv.disable(model)


def tokens(model, cache, prompt) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=2, prompt_cache=cache)
    return [token for token, _ in steps]


def test_same_checkpoint_in_other_bits_is_the_same_model(folder):
    model = mlx_lm.load(str(folder))[0]
    wide = model_fingerprint(model)
    model.set_dtype(mx.bfloat16)
    assert model_fingerprint(model) == wide
    model.set_dtype(mx.float16)
    narrow = model_fingerprint(model)
    model.set_dtype(mx.float32)
    assert model_fingerprint(model) == narrow


def test_prefixes_of_names_and_order_do_not_count():
    shapes = {
        "layers.0.self_attn.q_proj.weight": (8, 8),
        "layers.10.mlp.down_proj.weight": (8, 4),
        "embed_tokens.weight": (16, 8),
        "norm.weight": (8,),
    }
    numbers = {name: np.random.default_rng(len(name)).normal(size=N_VALUES) for name in shapes}
    codes = set()
    for prefixes in ("abcd", "dcba"):
        names = {f"{x}.{name}": name for x, name in zip(prefixes, shapes, strict=True)}
        named = ((name, shapes[names[name]]) for name in sorted(names))
        codes.add(fingerprint(named, lambda name, n, names=names: numbers[names[name]]))
    assert len(codes) == 1


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 1000, 576 * 576, 49152 * 576])
def test_stride_covers_a_matrix(size):
    positions = np.arange(size)[:: stride(size)][:N_VALUES]
    assert len(positions) == min(size, N_VALUES)
    assert positions[-1] >= 0.6 * (size - 1)


def test_fingerprint_reads_little():
    """Of SmolLM2-135M's shapes, a few kilobytes; here it took 11 ms."""
    args = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
    }
    model = llama.Model(llama.ModelArgs.from_dict(args))
    read = []
    assert len(sampled(name for name, _ in tree_flatten(model.parameters()))) == 211
    fingerprint(
        ((name, x.shape) for name, x in tree_flatten(model.parameters())),
        lambda name, n: read.append(n) or np.zeros(n),
    )
    assert 4 * sum(read) < 20_000
