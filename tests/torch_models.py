"""Tiny random models of transformers' families, and their greedy answers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TINY = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
HYBRID = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 3}
MLA = {
    **{name: x for name, x in TINY.items() if name not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, TINY),
    "llama-yarn": (transformers.LlamaConfig, {**TINY, "rope_parameters": YARN}),
    "mistral": (transformers.MistralConfig, {**TINY, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, TINY),
    "qwen3": (transformers.Qwen3Config, TINY),
    "phi3": (transformers.Phi3Config, TINY),
    "gemma": (transformers.GemmaConfig, TINY),
    "gemma3": (transformers.Gemma3TextConfig, {**TINY, **HYBRID, "num_hidden_layers": 6}),
    "deepseek_v2": (transformers.DeepseekV2Config, {**MLA, "topk_method": "greedy"}),
    "deepseek_v3": (transformers.DeepseekV3Config, MLA),
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model that never ends its answer; its tokens depend on all that came before."""
    config_class, tiny = FAMILIES[name]
    torch.manual_seed(0)
    common = {"initializer_range": 0.2, "tie_word_embeddings": False, "eos_token_id": None}
    config = config_class(**{**tiny, **common, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def make_prompt(n_tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 200, (batch, n_tokens), generator=generator)


def greedy(
    model: Any, prompt: torch.Tensor, mask: torch.Tensor | None = None, n: int = 12, **options: Any
) -> list[list[int]]:
    """The tokens that ``generate`` adds."""
    mask = torch.ones_like(prompt) if mask is None else mask
    output = model.generate(
        prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, **options
    )
    return output[:, prompt.shape[1] :].tolist()
