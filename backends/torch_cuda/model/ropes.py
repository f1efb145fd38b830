"""transformers' rotary embedding modules as data."""

from __future__ import annotations

import torch

from xkv.errors import InputError
from xkv.ops.types import RopeSpec

_BUFFER = "inv_freq"


def rope_candidates(model: torch.nn.Module) -> list[RopeSpec]:
    """Every rotation that a model's modules may give its keys; which one it is, keys show.

    Raises:
        InputError: If frequencies change with the length, by name.
    """
    specs: dict[RopeSpec, None] = {}
    for module in model.modules():
        for name, inverse_freqs in module.named_buffers(recurse=False):
            if not name.endswith(_BUFFER) or "original" in name:
                continue
            # one module may hold the frequencies of several kinds of layers
            prefix = name.removesuffix(_BUFFER)
            kind = getattr(module, "rope_type", "default")
            kind = kind if isinstance(kind, str) else kind[prefix.removesuffix("_")]
            if "dynamic" in kind or kind == "longrope":
                raise InputError(
                    f"rotary embedding {type(module).__name__} of type {kind!r} changes with the "
                    "length, which is not supported on PyTorch; use --group-size 0, or "
                    "--backend mlx"
                )
            freqs = tuple((1.0 / inverse_freqs.double()).tolist())
            scale = float(getattr(module, f"{prefix}attention_scaling", 1.0))
            specs.update(dict.fromkeys(RopeSpec(freqs, way, scale) for way in (False, True)))
    return list(specs)
