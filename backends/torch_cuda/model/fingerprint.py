"""Telling transformers' models apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from xkv.cache.fingerprint import fingerprint, stride


def model_fingerprint(model: PreTrainedModel) -> str:
    """What a file says of the model that made its rows; of a sharded one, its rank's shard."""
    parameters = {
        name: getattr(x, "to_local", lambda x=x: x)().detach()
        for name, x in model.named_parameters()
    }
    for name, module in model.named_modules():
        # numbers beside an adapter's parameters, not among them
        scales = getattr(module, "scaling", None) if hasattr(module, "lora_A") else None
        for key, scale in scales.items() if isinstance(scales, dict) else ():
            parameters[f"{name}.scale.{key}"] = torch.tensor(float(scale))

    def few(name: str, n_values: int) -> Any:
        x = parameters[name]
        return x.reshape(-1)[:: stride(x.numel())][:n_values].float().cpu().numpy()

    return fingerprint(((name, tuple(x.shape)) for name, x in parameters.items()), few)
