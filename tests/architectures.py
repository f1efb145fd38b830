"""Tiny random models of every architecture file of the installed mlx-lm."""

from __future__ import annotations

import copy
import importlib
import math
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten


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


def _same(value: Any, names: str) -> dict[str, Any]:
    """Returns one value under several space-separated names."""
    return dict.fromkeys(names.split(), value)


# Files spell one thing in many ways; `ModelArgs.from_dict` drops the names a file does not have.
_BASE: dict[str, Any] = {
    "vocab_size": 256,
    **_same(64, "hidden_size hidden_dim d_model model_dim n_embd block_dim"),
    **_same(6, "num_hidden_layers num_layers n_layers n_layer num_transformer_layers"),
    **_same(4, "num_attention_heads num_heads n_heads n_head"),
    **_same(2, "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups"),
    **_same(96, "intermediate_size n_inner ffn_hidden_size mlp_hidden_size intermediate_size_mlp"),
    **_same(16, "head_dim kv_channels hidden_size_per_head query_pre_attn_scalar"),
    **_same(4096, "max_position_embeddings n_positions n_ctx block_size model_max_length"),
    **_same(10000.0, "rope_theta rotary_emb_base"),
    **_same(8, "sliding_window window_size attention_window_size sliding_window_size"),
    **_same(1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon post_norm_eps"),
    **_same(False, "attention_bias mlp_bias use_bias use_qkv_bias conv_bias mamba_proj_bias"),
    **_same(True, "tie_word_embeddings use_qk_norm qk_norm norm_topk_prob use_conv_bias"),
    **_same(None, "rope_scaling"),
    # Experts: two dense layers and four sparse ones, where a file has both.
    **_same(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts num_shared_expert"),
    **_same(1, "n_group topk_group moe_layer_freq decoder_sparse_step routed_scaling_factor"),
    **_same(2, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    **_same(32, "moe_intermediate_size shared_expert_intermediate_size share_expert_dim"),
    **_same(32, "shared_intermediate_size moe_shared_expert_intermediate_size"),
    **_same(32, "expert_ffn_hidden_size moe_hidden_size"),
    "mlp_only_layers": [0, 1],
    # Latent attention.
    **_same(32, "kv_lora_rank q_lora_rank"),
    **_same(16, "qk_nope_head_dim v_head_dim"),
    "qk_rope_head_dim": 8,
    # State-space and linear attention layers.
    **_same(4, "conv_kernel linear_conv_kernel_dim mamba_d_conv conv1d_width"),
    **_same(16, "state_size ssm_state_size mamba_d_state linear_key_head_dim mamba_head_dim"),
    **_same(16, "linear_value_head_dim mamba_d_head"),
    **_same(4, "linear_num_value_heads mamba_num_heads mamba_n_heads time_step_rank"),
    **_same(2, "linear_num_key_heads n_groups mamba_n_groups mamba_expand group_norm_size"),
    **_same(3, "full_attention_interval layer_group_size"),
    "conv_L_cache": 3,
}

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = {"layer_types": [_SLIDING, _FULL] * 3}
_LINEAR = {"layer_types": ["linear_attention", _FULL] * 3}
_CONV = {"layer_types": ["conv", _FULL] * 3}
_MAMBA = {"layer_types": ["mamba", "attention"] * 3}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_BOTH_ROPES = {
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        _FULL: {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    }
}
_LLAMA4_ROPE = {
    "rope_parameters": _YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1},
}
_ALPHA_ROPE = {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0}}
_SU = {
    "type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 1.5, 2.0, 2.5],
}
_HALF_ROPE = {"partial_rotary_factor": 0.5}
_MLA = {"num_key_value_heads": 4}
# Eight keys of 40 tokens, so that the selection matters.
_INDEXER = _MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_GRANITE = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
_MINICPM = {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0}
_KDA = {
    "linear_attn_config": {
        "kda_layers": [1, 2, 4, 5],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    }
}

_DELTAS: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": _MIXED,
    "apertus": {"post_norm": False},
    "baichuan_m1": {
        "sliding_window_layers": [0, 2, 4],
        "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "bailing_hybrid": _MLA,
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {},
    "bitnet": {},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window_pattern": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek_v2": _MLA | {"rope_scaling": _YARN},
    "deepseek_v3": _MLA,
    "deepseek_v32": _INDEXER,
    "deepseek_v41": {
        "head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [0, 0, 4, 4, 2, 2],
        "kv_source_layer_ids": [2, 4],
        "index_source_layer_ids": [2, 4],
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 4,
        "hc_mult": 2,
    },
    "dots1": {"scoring_func": "noaux_tc"},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "exaone_moe": _MIXED | {"is_moe_layer": [False, False, True, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 1.0},
    "gear": {"layer_types": [_SLIDING, _FULL, "conv_mixer"] * 2},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 3},
    "glm": {},
    "glm4": _HALF_ROPE,
    "glm4_moe": _HALF_ROPE,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _INDEXER
    | _NOAUX
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": _MIXED,
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE | _MAMBA | {"mamba_conv_bias": True},
    "helium": {},
    "hunyuan": _ALPHA_ROPE | {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2},
    "hunyuan_v1_dense": _ALPHA_ROPE,
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_window_size": 8},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": _MLA | _KDA,
    "laguna": _MIXED | _BOTH_ROPES,
    "lfm2": _CONV
    | {
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": _CONV | {"use_expert_bias": True},
    "lille-130m": {},
    "llama": _MIXED,
    "llama4_text": {"no_rope_layers": [1, 1, 0] * 2},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "num_layers": 3,
    },
    "longcat_flash_ngram": {
        "ngram_vocab_size_ratio": 2,
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "num_layers": 3,
        "emb_split_num": 2,
        "emb_neighbor_num": 3,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "time_step_limit": (0.0, 100.0)},
    "mellum": _MIXED | _BOTH_ROPES,
    "mimo": {},
    "mimo_v2_flash": _HALF_ROPE
    | _NOAUX
    | {
        "hybrid_layer_pattern": [1, 0] * 3,
        "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
    },
    "minicpm": _MINICPM,
    "minicpm3": _MINICPM | {"rope_scaling": _SU},
    "minimax": {"rotary_dim": 8},
    "ministral3": _MIXED | _LLAMA4_ROPE,
    "mistral4": _MLA | _LLAMA4_ROPE,
    "mixtral": {},
    "muse_glimmer": _MIXED,
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
        ]
        * 2,
    },
    "nemotron_h": {"hybrid_override_pattern": list("M*-ME*ME")},
    "olmo": {"embedding_size": 256},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmo_hybrid": _LINEAR | {"linear_allow_neg_eigval": True},
    "olmoe": {},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4, 4, 8, 8, 8],
        "num_kv_heads": [2, 2, 2, 4, 4, 4],
        "ffn_multipliers": [0.5, 1.0] * 3,
    },
    "phi": {},
    "phi3": {},
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
    },
    "phimoe": {},
    "phixtral": {"num_vocab": 256, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": {},
    "plamo3": {"sliding_window_pattern": 3},
    "qwen": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": _HALF_ROPE,
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "logits_soft_cap": 30.0,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 3},
    "solar_open": {},
    "spark2_5": _MIXED | _BOTH_ROPES,
    "stablelm": _HALF_ROPE,
    "starcoder2": {},
    "step3p5": _MIXED | {"moe_layers_enum": "2,3,4,5"},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": _MLA,
}

_MINIMAX_M3 = {
    "dense_intermediate_size": 96,
    "moe_layer_freq": [0, 0, 1, 1, 1, 1],
    "sparse_attention_freq": [0, 1] * 3,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
}
_QWEN3_5 = {"rope_parameters": {"type": "default", "rope_theta": 10000.0} | _HALF_ROPE}
_GEMMA3N = _MIXED | {
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 256,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
_GEMMA4 = _MIXED | {"global_head_dim": 32, "hidden_size_per_layer_input": 0}
_KIMI_K3 = (
    _MLA
    | _KDA
    | {
        "activation_situ_beta": 4.0,
        "attn_res_block_size": 2,
        "mla_use_output_gate": True,
    }
)

_DELTAS["gemma4_text"] = _GEMMA4 | {
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
}

# Wrappers of a text model: the text model's type and what its configuration differs in.
_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _DELTAS["gemma3_text"]),
    "gemma3n": ("gemma3n", _GEMMA3N),
    "gemma4": (
        "gemma4_text",
        _GEMMA4 | {"num_kv_shared_layers": 0, "enable_moe_block": True, "attention_k_eq_v": True},
    ),
    "kimi_k25": ("deepseek_v3", _MLA),
    "kimi_k3": ("kimi_linear", _KIMI_K3),
    "kimi_vl": ("deepseek_v3", _MLA),
    "lfm2-vl": ("lfm2", _DELTAS["lfm2"]),
    "llama4": (
        "llama4_text",
        {"num_hidden_layers": 8, "attention_chunk_size": 8, "interleave_moe_layer_step": 2},
    ),
    "minimax_m3_vl": ("minimax_m3", _MINIMAX_M3),
    "mistral3": ("ministral3", _DELTAS["ministral3"]),
    "muse_spark": (
        "muse_spark_text",
        _MIXED
        | {
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0.0] * 3,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "num_shared_experts": 0,
        },
    ),
    "pixtral": ("mistral", {}),
    "prism_hadamard_qwen35": ("qwen3_5", _QWEN3_5 | {"num_experts": 0, "hidden_size": 128}),
    "qwen2_vl": ("qwen2", {}),
    "qwen3_5": ("qwen3_5", _QWEN3_5 | {"num_experts": 0}),
    "qwen3_5_moe": ("qwen3_5_moe", _QWEN3_5),
    "qwen3_vl": ("qwen3", {}),
    "qwen3_vl_moe": ("qwen3_moe", {}),
}

NOT_BUILT: dict[str, str] = {}

CONFIGS: dict[str, dict[str, Any]] = {
    name: _BASE | {"model_type": name} | delta for name, delta in _DELTAS.items()
} | {
    name: {
        "model_type": name,
        "vocab_size": _BASE["vocab_size"],
        "text_config": _BASE | {"model_type": text} | delta,
    }
    for name, (text, delta) in _TEXT.items()
}
CONFIGS["prism_hadamard_qwen35"] |= {
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [
        {
            "path": f"model.layers.{layer}.self_attn.{name}_proj",
            "embedding": False,
            "dtype": "float16",
            "block": 0,
        }
        for layer in (2, 5)
        for name in "qkv"
    ],
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
        bits = 8 * value.dtype.size
        return mx.random.bits(value.shape, width=min(bits, 4)).astype(value.dtype)
    noise = mx.random.normal(value.shape)
    if value.ndim < 2 or "A_log" in name:
        noise = value + 0.05 * noise
    elif name.endswith((".scales", ".biases")):
        noise = 0.05 * noise
    else:
        fan_in = math.prod(value.shape[1:]) if "conv" in name else value.shape[-1]
        noise = noise / math.sqrt(fan_in)
    return noise.astype(value.dtype)


def build(model_file: str, seed: int = 0) -> nn.Module:
    """Builds the tiny model of one architecture file with random weights.

    Args:
        model_file: A name of `CONFIGS`.
        seed: Seed of MLX's random generator.

    Returns:
        The model, evaluated and in eval mode.
    """
    if model_file == "olmo":
        # The file exits unless this import works, and does not use it.
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    module = importlib.import_module(f"mlx_lm.models.{model_file}")
    args = module.ModelArgs.from_dict(copy.deepcopy(CONFIGS[model_file]))
    mx.random.seed(seed)
    if model_file == "bitnet" and not mx.metal.is_available():
        # Its ternary projections have a Metal kernel only.
        with mock.patch.object(module, "BitLinear", nn.Linear):
            model = module.Model(args)
    else:
        model = module.Model(args)
    weights = sorted(tree_flatten(model.parameters()))
    model.update(tree_unflatten([(name, _randomize(name, w)) for name, w in weights]))
    mx.eval(model.parameters())
    return model.eval()
