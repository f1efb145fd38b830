"""mlx-lm's rotary embedding modules as data."""

from __future__ import annotations

import mlx.nn as nn
import numpy as np
from mlx_lm.models import rope_utils

from xkv.errors import InputError
from xkv.rope import DynamicNTKRope, Rope, RopeSpec


def rope_of(module: nn.Module) -> Rope | None:
    """What a rope module does to keys.

    Args:
        module: ``nn.RoPE``, a class of ``mlx_lm.models.rope_utils``, or a ``NoPE``.

    Returns:
        The rotation as data; None where the module leaves keys as they are.

    Raises:
        InputError: For any other class, by name.
    """
    kind = type(module)
    if kind is nn.RoPE:
        return RopeSpec.standard(module.dims, module.base, module.traditional, module.scale)
    if kind is rope_utils.DynamicNTKScalingRoPE:
        return DynamicNTKRope(
            module.dims,
            module.base,
            module.factor,
            module.max_position_embeddings,
            module.traditional,
        )
    if kind is rope_utils.SuScaledRoPE:
        return RopeSpec(_freqs(module), scale=float(module._scale))
    if kind is rope_utils.YarnRoPE:
        return RopeSpec(_freqs(module), module.traditional, float(module.mscale))
    if kind in (rope_utils.Llama3RoPE, rope_utils.ProportionalRoPE):
        return RopeSpec(_freqs(module), module.traditional)
    if kind.__name__ == "NoPE":
        return None
    raise InputError(
        f"rotary embedding {kind.__name__} is not known, so its keys cannot be un-rotated; "
        "use --group-size 0 to run with the full cache"
    )


def find_rope(layer: nn.Module) -> Rope | None:
    """The rotation that one decoder layer applies to its keys, None if it has none.

    Raises:
        InputError: If the layer has several rope modules, or one of an unknown class.
    """
    modules = {
        id(module): module
        for name, module in layer.named_modules()
        if name.rsplit(".", 1)[-1] in ("rope", "rotary_emb", "rotary_pos_emb")
    }
    ropes = {rope_of(module) for module in modules.values()}
    if len(ropes) > 1:
        raise InputError(
            f"a layer has {len(ropes)} different rotary embeddings, which is not supported; "
            "use --group-size 0 to run with the full cache"
        )
    return ropes.pop() if ropes else None


def _freqs(module: nn.Module) -> tuple[float, ...]:
    return tuple(np.array(module._freqs).astype(np.float64).tolist())
