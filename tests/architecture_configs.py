"""Tiny configurations of every architecture file of mlx-lm."""

from __future__ import annotations

from typing import Any


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
    **_same(True, "mamba_conv_bias linear_allow_neg_eigval"),
    "rope_scaling": None,
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
_HALF_ROPE = {"partial_rotary_factor": 0.5}
_MLA = {"num_key_value_heads": 4}

# One entry per key would be three times as long.
# fmt: off
_MIXED = {"layer_types": [_SLIDING, _FULL] * 3}
_CONV = {"layer_types": ["conv", _FULL] * 3}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_SU = {
    "type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 2.5],
}
_ALPHA_ROPE = {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0}}
_LLAMA4_ROPE = {"rope_parameters": _YARN | {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}}
_NESTED_ROPE = {"rope_parameters": {"type": "default", "rope_theta": 10000.0} | _HALF_ROPE}
_BOTH_ROPES = {"rope_parameters": {
    _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "default", "rope_theta": 50000.0} | _HALF_ROPE,
}}
# Few enough keys of 40 for the selection to matter.
_INDEXER = _MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_GRANITE = {
    "attention_multiplier": 0.25,
    **_same(1.0, "logits_scaling embedding_multiplier residual_multiplier"),
}
_MINICPM = {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0}
_KDA = {"linear_attn_config": {
    "kda_layers": [1, 2, 4, 5], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4,
}}
_LONGCAT = {
    "num_layers": 3, "zero_expert_num": 2, "zero_expert_type": "identity",
    "attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}
_LFM2 = _CONV | {
    "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
}
_GEMMA3 = {"sliding_window_pattern": 3}
_GEMMA4 = _MIXED | {"global_head_dim": 32}
_PER_LAYER = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16}
_MINISTRAL = _MIXED | _LLAMA4_ROPE

# Files that need nothing more than the base.
_PLAIN = """
Klear bailing_moe bailing_moe_linear bailing_moe_v3 bitnet deepseek ernie4_5 ernie4_5_moe exaone
gemma gemma2 glm gpt2 gpt_bigcode helium internlm2 internlm3 lille-130m mamba mimo mixtral nanochat
olmo2 olmoe phi phi3 phimoe plamo2 qwen qwen2 qwen2_moe qwen3 qwen3_moe seed_oss starcoder2 talkie
telechat3
"""
_DELTAS: dict[str, dict[str, Any]] = {name: {} for name in _PLAIN.split()} | {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": _MIXED,
    "apertus": {"post_norm": False},
    "baichuan_m1": {
        "sliding_window_layers": [0, 2, 4], "conv_window": 2, "tie_word_embeddings": False,
    },
    "bailing_hybrid": _MLA,
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, "sliding_window_pattern": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": _MLA | {"rope_scaling": _YARN},
    "deepseek_v3": _MLA,
    "deepseek_v32": _INDEXER,
    "deepseek_v41": {
        "head_dim": 32, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2,
        "compress_ratios": [0, 0, 4, 4, 2, 2], "kv_source_layer_ids": [2, 4],
        "index_source_layer_ids": [2, 4], "index_n_heads": 2, "index_head_dim": 32,
        "index_topk": 4,
    },
    "dots1": {"scoring_func": "noaux_tc"},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "exaone_moe": _MIXED | {"is_moe_layer": [False] * 2 + [True] * 4},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 1.0},
    "gear": {"layer_types": [_SLIDING, _FULL, "conv_mixer"] * 2},
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4 | _PER_LAYER | {"num_kv_shared_layers": 2},
    "glm4": _HALF_ROPE,
    "glm4_moe": _HALF_ROPE,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _INDEXER | _NOAUX | _NESTED_ROPE,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": _MIXED,
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE | {"layer_types": ["mamba", "attention"] * 3},
    "hunyuan": _ALPHA_ROPE | {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2},
    "hunyuan_v1_dense": _ALPHA_ROPE,
    "iquestloopcoder": {"loop_window_size": 8},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 3,
        "expert_layer_offset": 1, "expert_layer_period": 2,
    },
    "kimi_linear": _MLA | _KDA,
    "laguna": _MIXED | _BOTH_ROPES,
    "lfm2": _LFM2,
    "lfm2_moe": _CONV | {"use_expert_bias": True},
    "llama": _MIXED,
    "llama4_text": {"no_rope_layers": [1, 1, 0] * 2},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT | {
        "ngram_vocab_size_ratio": 2, "emb_split_num": 2, "emb_neighbor_num": 3,
    },
    "mamba2": {"num_heads": 8, "time_step_limit": (0.0, 100.0)},
    "mellum": _MIXED | _BOTH_ROPES,
    "mimo_v2_flash": _HALF_ROPE | _NOAUX | {
        "hybrid_layer_pattern": [1, 0] * 3, "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "layernorm_epsilon": 1e-5, "head_dim": 24, "swa_head_dim": 24, "swa_v_head_dim": 16,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_rope_theta": 10000.0,
    },
    "minicpm": _MINICPM,
    "minicpm3": _MINICPM | {"rope_scaling": _SU},
    "minimax": {"rotary_dim": 8},
    "ministral3": _MINISTRAL,
    "mistral4": _MLA | _LLAMA4_ROPE,
    "muse_glimmer": _MIXED,
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
    ] * 2},
    "nemotron_h": {"hybrid_override_pattern": list("M*-ME*M-E")},
    "olmo3": _MIXED,
    "olmo_hybrid": {"layer_types": ["linear_attention", _FULL] * 3},
    "openelm": {
        "num_query_heads": [4, 4, 4, 8, 8, 8], "num_kv_heads": [2, 2, 2, 4, 4, 4],
        "ffn_multipliers": [0.5, 1.0] * 3, "ffn_dim_divisor": 32,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2, "ff_intermediate_size": 96, "gegelu_limit": 20.0,
    },
    "phixtral": {"num_vocab": 256, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo3": {"sliding_window_pattern": 3},
    "qwen3_next": _HALF_ROPE,
    "recurrent_gemma": {"block_types": ["recurrent"] * 2 + ["attention"], "logits_soft_cap": 30.0},
    "rwkv7": _same(8, "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim"),
    "smollm3": {"no_rope_layer_interval": 3},
    "solar_open": _HALF_ROPE,
    "spark2_5": _MIXED | _BOTH_ROPES,
    "stablelm": _HALF_ROPE,
    "step3p5": _MIXED | {"moe_layers_enum": "2,3,4,5"},
    "youtu_llm": _MLA,
}

# Wrappers of a text model: the text model's type and what its configuration differs in.
_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _GEMMA3),
    "gemma3n": ("gemma3n_text", _MIXED | _PER_LAYER | {
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0, "laurel_rank": 8,
        "altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True,
        "altup_active_idx": 0,
    }),
    "gemma4": ("gemma4_text", _GEMMA4 | {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
        "attention_k_eq_v": True,
    }),
    "kimi_k25": ("deepseek_v3", _MLA),
    "kimi_k3": ("kimi_linear", _MLA | _KDA | {
        "activation_situ_beta": 4.0, "attn_res_block_size": 2, "mla_use_output_gate": True,
    }),
    "kimi_vl": ("deepseek_v3", _MLA),
    "lfm2-vl": ("lfm2", _LFM2),
    "llama4": ("llama4_text", {
        "num_hidden_layers": 8, "num_experts_per_tok": 1, "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2,
    }),
    "minimax_m3_vl": ("minimax_m3", {
        "dense_intermediate_size": 96, "moe_layer_freq": [0, 0, 1, 1, 1, 1],
        "sparse_attention_freq": [0, 1] * 3, "index_n_heads": 2, "index_head_dim": 16,
        "index_block_size": 4, "index_topk_blocks": 2,
    }),
    "mistral3": ("ministral3", _MINISTRAL),
    "muse_spark": ("muse_spark_text", _MIXED | _NESTED_ROPE | {
        "layer_rope_theta": [10000.0, 0.0] * 3,
        "final_logit_softcapping": 20.0, "output_multiplier": 1.0, "num_shared_experts": 0,
    }),
    "pixtral": ("mistral", {}),
    "prism_hadamard_qwen35": ("qwen3_5", _NESTED_ROPE | {"num_experts": 0, "hidden_size": 128}),
    "qwen2_vl": ("qwen2", {}),
    "qwen3_5": ("qwen3_5", _NESTED_ROPE | {"num_experts": 0}),
    "qwen3_5_moe": ("qwen3_5_moe", _NESTED_ROPE),
    "qwen3_vl": ("qwen3", {}),
    "qwen3_vl_moe": ("qwen3_moe", {}),
}
CONFIGS: dict[str, dict[str, Any]] = {
    name: _BASE | {"model_type": name} | delta for name, delta in _DELTAS.items()
} | {
    key: {"model_type": key, "vocab_size": 256, "text_config": _BASE | {"model_type": text} | delta}
    for key, (text, delta) in _TEXT.items()
}
CONFIGS["prism_hadamard_qwen35"] |= {
    "tensor_namespace": "mlx-vlm-qwen3_5",
    "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    "modules": [
        {"path": f"model.layers.{layer}.self_attn.{name}_proj", "block": 0,
         "embedding": False, "dtype": "float16"}
        for layer in (2, 5) for name in "qkv"
    ],
}
# fmt: on
