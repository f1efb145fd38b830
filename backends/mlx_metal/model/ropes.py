"""mlx-lm's and mlx-vlm's rotary embedding modules as data."""

from __future__ import annotations

import mlx.nn as nn
import numpy as np

from xkv.backends.mlx_metal.model import borrowed
from xkv.errors import InputError
from xkv.ops.types import DynamicNTKRope, Rope, RopeSpec

rope_utils = borrowed.module("mlx_lm.models.rope_utils")


def rope_of(module: nn.Module) -> Rope | None:
    """What a rope module does to keys.

    Args:
        module: ``nn.RoPE``, a class of ``mlx_lm.models.rope_utils`` or of mlx-vlm's, or a ``NoPE``.

    Returns:
        The rotation as data; None where the module leaves keys as they are.

    Raises:
        InputError: For any other class, by name.
    """
    kind = type(module)
    if kind.__module__.startswith("mlx_vlm.") and (rope := _vlm_rope(module)) is not None:
        return rope
    if kind is nn.RoPE:
        return RopeSpec.standard(module.dims, module.base, module.traditional, module.scale)
    if kind is getattr(rope_utils, "DynamicNTKScalingRoPE", None):  # since mlx-lm 0.32
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
    if kind.__name__ == "DynamicNTKAlphaRoPE":
        return RopeSpec(_freqs(module))
    raise InputError(
        f"rotary embedding {kind.__name__} is not known, so its keys cannot be un-rotated; "
        "use --group-size 0 to run with the full cache"
    )


def _vlm_rope(module: nn.Module) -> Rope | None:
    """What a class of mlx-vlm's own does to keys; None for one that is not known."""
    kind = type(module)
    theirs = borrowed.module("mlx_vlm.models.rope_utils")
    if issubclass(kind, theirs.MRoPERotaryEmbedding):
        # of text, whose three positions are one. Keys of an image turn otherwise, and what undoes
        # this on the way in does it again on the way out: exact, but of a higher rank
        freqs = 1 / np.array(module.inv_freq).astype(np.float64)
        return RopeSpec(tuple(freqs.tolist()), module.pairing == "even_odd")
    if kind is theirs.EagerRoPE:
        return RopeSpec.standard(module.dims, module.base, module.traditional, module.scale)
    if kind is theirs.YarnRoPE:
        return RopeSpec(_freqs(module), module.traditional, float(module.mscale))
    if kind in (theirs.Llama3RoPE, theirs.ProportionalRoPE):
        return RopeSpec(_freqs(module), module.traditional)
    return None


def is_rope_name(path: str) -> bool:
    """Whether a module at this path is, by their habits, a rotary embedding."""
    return path.rsplit(".", 1)[-1] in ("rope", "rotary_emb", "rotary_pos_emb")


def _freqs(module: nn.Module) -> tuple[float, ...]:
    return tuple(np.array(module._freqs).astype(np.float64).tolist())
