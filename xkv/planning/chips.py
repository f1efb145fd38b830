"""Chips by their data sheets, named models, and the milliseconds that work takes on one.

Assumptions, none of them measured: a part of a step takes as long as its bytes or its products,
whichever is longer, and parts follow each other; a launch costs 3 us on Metal, and 1.5 us in a
replayed CUDA graph; products reach 0.64 of an Apple chip's nominal rate and 0.4 of an H100's.
"""

from __future__ import annotations

from dataclasses import dataclass

from xkv.config import XKVConfig
from xkv.planning.decode_cost import (
    Bits,
    LayerShape,
    Parts,
    full_cache,
    planned_bits,
    total,
    working_set,
)
from xkv.store.shapes import CacheShape, GroupShape

METAL_LAUNCH_US, CUDA_LAUNCH_US = 3.0, 1.5
APPLE_SHARE, CUDA_SHARE = 0.64, 0.4
LENGTHS = (8192, 32768, 131072)
"""At which decode is estimated."""


@dataclass(frozen=True)
class Chip:
    """What a chip does in a second.

    Args:
        name: For people.
        bandwidth: Bytes of memory a second.
        products: Floating-point operations a second that matrix products reach.
        launch_us: Microseconds of a launch.
        is_metal: As in :func:`xkv.planning.decode_cost.working_set`.
        source: Where the figures are from.
    """

    name: str
    bandwidth: float
    products: float
    launch_us: float = METAL_LAUNCH_US
    is_metal: bool = True
    source: str = ""


def _apple(name: str, gb: float, tflops: float, source: str) -> Chip:
    return Chip(name, gb * 1e9, tflops * 1e12 * APPLE_SHARE, source=source)


_LANES = "bandwidth: Apple's specification page; products: {} cores of 128 lanes at {} GHz"
CHIPS = (
    _apple("M1", 68, 2.6, "Apple's specification page (bandwidth) and announcement (GPU)"),
    _apple("M2 Pro", 200, 6.8, _LANES.format(19, 1.4)),
    _apple("M3 Max", 400, 14.1, _LANES.format(40, 1.38)),
    _apple("M4 Max", 546, 18.0, _LANES.format(40, 1.76)),
    Chip(
        *("H100 SXM", 3.35e12, 990e12 * CUDA_SHARE, CUDA_LAUNCH_US, False),
        source="NVIDIA's data sheet: HBM3, bfloat16 without sparsity",
    ),
)


def milliseconds(chip: Chip, parts: Parts, n_layers: int = 1, weight_bytes: int = 0) -> float:
    """What a step of so many layers alike takes, and the weights read beside it."""
    seconds = sum(max(x.n_bytes / chip.bandwidth, x.flops / chip.products) for x in parts.values())
    seconds += total(parts).launches * chip.launch_us * 1e-6
    return 1e3 * (n_layers * seconds + weight_bytes / chip.bandwidth)


@dataclass(frozen=True)
class NamedModel:
    """A model whose layers are alike.

    Args:
        n_layers: All of them.
        n_heads: Query heads.
        group: Most of its groups.
        weight_bytes: Read for a token.
        bits: Of the latents, where they were measured.
    """

    n_layers: int
    n_heads: int
    group: GroupShape
    weight_bytes: int
    bits: tuple[Bits, Bits] | None = None

    def layer(self, config: XKVConfig, n_tokens: int, item_bytes: int = 2) -> LayerShape:
        """One layer, with the latents that a prompt of ``n_tokens`` has."""
        shape = CacheShape((self.group,), item_bytes)
        found = self.bits or (planned_bits(shape, config, n_tokens) or [((), ())])[0]
        return LayerShape(self.n_heads, self.group, item_bytes, *found)

    def forms(self, config: XKVConfig, n_tokens: int, is_metal: bool) -> tuple[Parts, Parts]:
        """The work of a layer over the full cache, and with a working set."""
        layer = self.layer(config, n_tokens)
        return full_cache(layer, n_tokens), working_set(layer, config, n_tokens, is_metal)


MODELS = {
    # 8.03e9 parameters but the input embedding's, in 4 bits with 16-bit scales and biases of 64
    "Llama-3.1-8B": NamedModel(32, 32, GroupShape(4, 8, 128, 128), 4_220_000_000),
    # 134.5e6 parameters in 16 bits
    "SmolLM2-135M": NamedModel(30, 9, GroupShape(4, 3, 64, 64), 269_000_000),
    # by its calibration, at 8 x and 8k tokens
    "bundled": NamedModel(
        *(8, 4, GroupShape(8, 2, 64, 64), 13_700_000, ((8, 5, 4, 3, 2), (6, 5, 4, 3, 2)))
    ),
}
