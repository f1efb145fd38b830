"""The bundled model before training: random weights, and the circuit planted in them."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about 6M parameters, random but for the induction circuit planted in it."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * config.num_hidden_layers))
        plant_induction_circuit(model, torch.Generator().manual_seed(seed))
    return model


def plant_induction_circuit(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Write the heads that retrieval is made of into the initial weights.

    Without them training stays on the plateau of guessing among the values in the document.
    Heads 0 and 1 of layer 0 attend one and two tokens back and write that token into a subspace of
    its own: their queries and keys are constant, so RoPE alone decides. In layers 1 and 3, head 0
    attends to where the current token was the previous one, and head 2 to where the current and
    the previous token were the previous one and the one before it; both copy what they find.
    """
    config = model.config
    head_dim, half, quarter, n_fast = config.head_dim, config.head_dim // 2, config.head_dim // 4, 6
    strength, write, match = 5.0, 0.04, 1.2
    frequencies = model.model.rotary_emb.inv_freq[:n_fast]

    def subspace() -> torch.Tensor:
        gaussian = torch.randn(config.hidden_size, head_dim, generator=generator)
        return torch.linalg.qr(gaussian)[0].T

    def head(index: int) -> slice:
        return slice(index * head_dim, (index + 1) * head_dim)

    token, previous, before_previous = subspace(), subspace(), subspace()

    attention = model.model.layers[0].self_attn
    attention.k_proj.bias[:n_fast] = strength
    attention.v_proj.weight[head(0)] = token
    for index, target in enumerate((previous, before_previous)):
        angles = frequencies * (index + 1)
        bias = attention.q_proj.bias[head(index)]
        bias[:n_fast] = strength * torch.cos(angles)
        bias[half : half + n_fast] = -strength * torch.sin(angles)
        attention.o_proj.weight[:, head(index)] += write * target.T

    # The slow half of the rotary pairs turns little: a match there does not depend on distance.
    slow = torch.cat([torch.arange(quarter, half), torch.arange(half + quarter, head_dim)])
    first, second = head_dim + slow[:quarter], head_dim + slow[quarter:]  # Rows of KV head 1.
    for layer in (1, 3):
        attention = model.model.layers[layer].self_attn
        keys, queries = attention.k_proj.weight, attention.q_proj.weight
        keys[slow] += match * previous[:half]
        queries[slow] += match * token[:half]
        # Query head 2 is the first that reads KV head 1.
        keys[first] += match * previous[half : half + quarter]
        queries[head_dim + first] += match * token[half : half + quarter]
        keys[second] += match * before_previous[:quarter]
        queries[head_dim + second] += match * previous[:quarter]
        for kv_index, index in ((0, 0), (1, 2)):
            attention.v_proj.weight[head(kv_index)] += token
            attention.o_proj.weight[:, head(index)] += write * token.T
