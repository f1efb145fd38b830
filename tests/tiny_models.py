"""Random models of mlx-lm's architectures, written to disk as checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from xkv.tiny import CHECKPOINT_DIR

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SU_ROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": {"model_type": "llama"},
    "llama-llama3": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN_ROPE},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama-traditional": {"model_type": "llama", "rope_traditional": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "phi3": {"model_type": "phi3"},
    "phi3-su": {"model_type": "phi3", "rope_scaling": SU_ROPE},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3"},
}


def write_checkpoint(folder: Path, architecture: dict, seed: int = 0) -> Path:
    """A checkpoint directory with random float32 weights and the bundled tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    config = {**COMMON, "vocab_size": tokenizer["vocab_size"], **architecture}
    config["eos_token_id"] = tokenizer["eos_token_id"]
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    # larger than the default initialization, so that the softmax of random attention is peaked
    weights = {
        name: array * 3 if name.endswith(("q_proj.weight", "k_proj.weight")) else array
        for name, array in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT_DIR / name, folder / name)
    return folder
