"""Checkpoints of the bundled model: taking one's weights, and writing one."""

import copy
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def take_weights(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Take a checkpoint's weights; embeddings of tokens it does not have stay random."""
    source = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    numbers = PreTrainedTokenizerFast.from_pretrained(path).get_vocab()
    rows = model.state_dict()["model.embed_tokens.weight"]
    weights = source.state_dict()
    known = weights["model.embed_tokens.weight"]
    rows *= known.std() / rows.std()
    for token, index in tokenizer.get_vocab().items():
        if token in numbers:
            rows[index] = known[numbers[token]]
    model.load_state_dict(weights | {"model.embed_tokens.weight": rows, "lm_head.weight": rows})


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write a float16 checkpoint; each file is replaced whole, so no reader sees half of one."""
    path.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.float16)
    half.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    theta = half.config.rope_parameters["rope_theta"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # mlx-lm reads rope_theta at the top level; transformers 4 lacks the class that 5 names.
        _update_json(Path(folder, "config.json"), rope_theta=theta)
        _update_json(
            Path(folder, "tokenizer_config.json"), tokenizer_class="PreTrainedTokenizerFast"
        )
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, path / file.name)


def _update_json(path: Path, **entries: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
