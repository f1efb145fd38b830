"""Tiny models of mlx-vlm with random weights, and prompts for them."""

from __future__ import annotations

import importlib

import mlx.core as mx
import numpy as np

VOCABULARY, IMAGE = 300, 290
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
_QWEN_VISION = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_CLIP_VISION = {**_VISION, "image_size": 56, "num_attention_heads": 2, "num_hidden_layers": 2}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 32,
}

CONFIGS = {
    # three positions a token, in blocks of frequencies
    "qwen2_5_vl": {
        **_TEXT,
        **_QWEN_TOKENS,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1]},
    },
    # three positions a token, interleaved
    "qwen3_vl": {
        **_QWEN_TOKENS,
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"type": "default", "mrope_section": [3, 3, 2]},
            "rope_theta": 10000.0,
        },
        "vision_config": {
            **_QWEN_VISION,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    },
    # linear attention, and rotations of a quarter of a head
    "qwen3_5": {
        **_QWEN_TOKENS,
        "text_config": {
            **_TEXT,
            **_LINEAR,
            "head_dim": 32,
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 8,
            "rope_parameters": {
                "type": "default",
                "mrope_section": [2, 2, 0],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
            },
        },
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 64},
    },
    # sliding windows, and caches of mlx-vlm's own
    "gemma3": {
        "hidden_size": 64,
        "image_token_index": IMAGE,
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "mm_tokens_per_image": 4,
            "model_type": "gemma3_text",
            "num_hidden_layers": 8,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "sliding_window_pattern": 2,
        },
        "vision_config": {**_CLIP_VISION, "model_type": "siglip_vision_model"},
    },
    "llava": {
        "image_token_index": IMAGE,
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP_VISION, "model_type": "clip_vision_model"},
    },
}
_IMAGE_TOKENS = {"gemma3": 4, "llava": 16}


def build(name):
    """A model by the name of its folder in mlx-vlm, the same each time."""
    package = importlib.import_module(f"mlx_vlm.models.{name}")
    config = package.ModelConfig.from_dict({"model_type": name, **CONFIGS[name]})
    for part, kind in (("text_config", "TextConfig"), ("vision_config", "VisionConfig")):
        settings = getattr(config, part)
        if isinstance(settings, dict):
            setattr(config, part, getattr(package, kind).from_dict(settings))
    mx.random.seed(list(CONFIGS).index(name))
    model = package.Model(config)
    mx.eval(model.parameters())
    return model


def text_prompt(n_tokens=190):
    """Tokens of a text, and no further arguments."""
    return np.random.default_rng(0).integers(0, 280, n_tokens).tolist(), {}


def image_prompt(name, n_tokens=140):
    """Tokens with an image between texts, and what a processor makes of the image."""
    (before, _), (after, _) = text_prompt(30), text_prompt(n_tokens)
    rng = np.random.default_rng(1)
    if name in _IMAGE_TOKENS:
        pixels = rng.normal(size=(1, 3, 56, 56)).astype(np.float32)
        return before + [IMAGE] * _IMAGE_TOKENS[name] + after, {"pixel_values": mx.array(pixels)}
    # 8 x 12 patches, four of which make a token
    pixels = rng.normal(size=(96, 2 * 3 * 14 * 14)).astype(np.float32)
    options = {"pixel_values": mx.array(pixels), "image_grid_thw": mx.array([[1, 8, 12]])}
    return [*before, 292, *[IMAGE] * 24, 293, *after], options


class Processor:
    """As much of a processor as mlx-vlm needs for tokens that are given."""

    last_segment = ""

    def __init__(self):
        self.tokenizer = self.detokenizer = self

    def stopping_criteria(self, token):
        return False

    def add_token(self, token, skip_special_token_ids):
        pass

    def finalize(self):
        pass

    reset = finalize
