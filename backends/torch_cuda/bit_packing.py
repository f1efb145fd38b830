"""Codes of a few bits in 32-bit words, in MLX's order."""

from __future__ import annotations

import functools

import torch

WORD = 32


@functools.cache
def _places(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For 32 codes: the word of each code's lowest bit, the next word, and the bit in the word."""
    first_bits = torch.arange(WORD, device=device) * bits
    words = first_bits // WORD
    return words, (words + 1).clamp(max=bits - 1), first_bits % WORD


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers below ``2**bits`` as one stream of bits, lowest first.

    Args:
        codes: int64 ``[..., N]``, N a multiple of 32.
        bits: 2 to 8.

    Returns:
        int32 ``[..., N * bits / 32]``: the bits of MLX's uint32, which few PyTorch operations take.
    """
    word, next_word, shift = _places(bits, codes.device)
    shape = codes.shape
    shifted = codes.reshape(*shape[:-1], -1, WORD) << shift
    words = shifted.new_zeros(*shifted.shape[:-1], bits)
    # no two codes share a bit, so that adding is joining
    words.index_add_(-1, word, shifted & 0xFFFFFFFF)
    words.index_add_(-1, next_word, shifted >> WORD)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.reshape(*shape[:-1], -1)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 ``[..., N * bits / 32]`` -> int32 ``[..., N]``."""
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    word, next_word, shift = _places(bits, words.device)
    grouped = (words.to(torch.int64) & 0xFFFFFFFF).reshape(*words.shape[:-1], -1, bits)
    codes = (grouped[..., word] >> shift) | (grouped[..., next_word] << (WORD - shift))
    return (codes & (2**bits - 1)).to(torch.int32).flatten(-2)
