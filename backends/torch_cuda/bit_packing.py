"""Codes of a few bits in 32-bit words, in MLX's order."""

from __future__ import annotations

import torch

WORD = 32

RUN = 8
"""So many codes of b bits take b bytes, which fit into a 64-bit word."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers below ``2**bits`` as one stream of bits, lowest first.

    Args:
        codes: int64 ``[..., N]``, N a multiple of 32.
        bits: 2 to 8.

    Returns:
        int32 ``[..., N * bits / 32]``: the bits of MLX's uint32, which few PyTorch operations take.
    """
    runs = codes.reshape(*codes.shape[:-1], -1, RUN) << _shifts(bits, codes.device)
    # no two codes share a bit, so that adding is joining
    in_bytes = runs.sum(-1, keepdim=True).view(torch.uint8)
    return in_bytes[..., :bits].flatten(-2).view(torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 ``[..., N * bits / 32]`` -> int32 ``[..., N]``."""
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    in_bytes = words.contiguous().view(torch.uint8)
    in_bytes = in_bytes.reshape(*words.shape[:-1], -1, bits)
    runs = torch.nn.functional.pad(in_bytes, (0, RUN - bits)).view(torch.int64)
    codes = (runs >> _shifts(bits, words.device)) & (2**bits - 1)
    return codes.to(torch.int32).flatten(-2)


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, RUN * bits, bits, device=device)
