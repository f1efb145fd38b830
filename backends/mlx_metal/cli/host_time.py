"""What a decode step costs the host: the time in which Python and MLX make a layer's graph."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enable import disable, enable
from xkv.config import XKVConfig
from xkv.tiny import CHECKPOINT_DIR, make_document

N_TOKENS, N_STEPS = 3000, 120
N_SEQUENCES = 1, 4

IS_METAL = mx.metal.is_available()


class Launching(MLXBackend):
    """Every kernel is launched; where there is no Metal, each launch gives zeros."""

    def __init__(self) -> None:
        super().__init__("on")
        if not IS_METAL:
            self.kernels.device_problem = lambda: None
            self.kernels.check = lambda kernel, twin, *args: None  # type: ignore[method-assign]

    def step_dtype(self, dtype: Any) -> Any:
        return dtype


@contextlib.contextmanager
def launches_of_zeros() -> Iterator[None]:
    """Where there is no Metal, its kernels are one node each inside."""
    if IS_METAL:
        yield
        return

    def metal_kernel(**_: Any) -> Any:
        def launch(output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            return list(map(mx.zeros, output_shapes, output_dtypes))

        return launch

    original = mx.fast.metal_kernel
    mx.fast.metal_kernel = metal_kernel  # type: ignore[assignment]
    common.build.cache_clear()
    try:
        yield
    finally:
        mx.fast.metal_kernel = original
        common.build.cache_clear()


def host_times(n_tokens: int = N_TOKENS) -> dict[tuple[int, str], float]:
    """Milliseconds a layer of the bundled model, of one conversation and of a batch of several.

    Returns:
        By how many there are, and by form: the full cache's, and ours at 8x.
    """
    model, tokenizer, *_ = borrowed.module("mlx_lm").load(str(CHECKPOINT_DIR))
    tokens = mx.array(tokenizer.encode(make_document(1, 2 * n_tokens).text)[:n_tokens])
    backend, times = Launching(), {}
    with launches_of_zeros():
        for form in ("full", "working set"):
            if form != "full":
                groups = (tuple(range(len(model.layers))),)
                enable(model, XKVConfig(compression=8, groups=groups), backend=backend)
            alone = borrowed.module("mlx_lm.models.cache").make_prompt_cache(model)
            generate = borrowed.module("mlx_lm.generate").generate_step
            list(generate(tokens, model, max_tokens=2, prompt_cache=alone))
            for n in N_SEQUENCES:
                cache = alone if n == 1 else [layer.merge([layer] * n) for layer in alone]
                seconds = []
                for _ in range(N_STEPS):
                    began = time.perf_counter()
                    logits = model(mx.broadcast_to(tokens[None, :1], (n, 1)), cache=cache)
                    seconds.append(time.perf_counter() - began)
                    mx.eval(logits)
                times[n, form] = 1e3 * statistics.median(seconds) / len(model.layers)
    assert backend.kernels.last_path["key_scores"] == "key_scores"
    disable(model)
    return times
