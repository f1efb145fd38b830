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
    """The inverse of :func:`pack`: int32 ``[..., N * bits / 32]`` -> whole numbers ``[..., N]``."""
    if bits == 8:
        return words.contiguous().view(torch.uint8)
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    # four codes begin at a byte or, every other four of 5 bits, in the middle of one
    in_bytes = words.contiguous().view(torch.uint8).to(torch.int32)
    in_bytes = in_bytes.reshape(*words.shape[:-1], -1, 5 if bits == 5 else 3)
    first, second, third = (in_bytes[..., i] for i in range(3))
    runs = first | second << 8 | third << 16
    if bits == 5:
        runs = torch.stack([runs, third >> 4 | in_bytes[..., 3] << 4 | in_bytes[..., 4] << 12], -1)
    n_codes = 8 if bits == 3 else 4
    shifts = torch.arange(0, n_codes * bits, bits, device=words.device, dtype=torch.int32)
    return ((runs[..., None] >> shifts) & (2**bits - 1)).reshape(*words.shape[:-1], -1)


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, RUN * bits, bits, device=device)
