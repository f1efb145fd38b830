"""What the small model is calibrated on."""

from __future__ import annotations

import numpy as np

from xkv import XKVConfig
from xkv.planning.calibrate_model import N_HELD_OUT
from xkv.planning.calibration import CONTEXT_TOKENS, PREDICTED_TOKENS

CONFIG = XKVConfig(group_size=3)
N_TOKENS = CONTEXT_TOKENS + PREDICTED_TOKENS


def pieces(n: int = N_HELD_OUT + 2) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 250, N_TOKENS).tolist() for _ in range(n)]
