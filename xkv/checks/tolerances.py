"""How far a result may be from the float64 reference: relative L2 error, by dtype.

Each bound is at most ten times the error that was measured; planted faults exceed it tenfold.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 8e-3}

PLAIN_TOLERANCE = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}
"""For plain operations, which round keys, weights and products to the dtype on the way."""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 error.

    Raises:
        ValueError: If the shapes differ or ``got`` is not finite.
    """
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, expected {want.shape}")
    if not np.isfinite(got).all():
        raise ValueError("not finite")
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
