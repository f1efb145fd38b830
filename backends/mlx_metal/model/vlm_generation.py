"""mlx-vlm's functions for a model that is enabled; for every other model they are as they were."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enabled import Enabled, enabled_state
from xkv.backends.mlx_metal.model.generation import patch_for
from xkv.backends.mlx_metal.model.seam import Patch
from xkv.backends.mlx_metal.model.snapshot import undone_on_error
from xkv.backends.mlx_metal.model.vlm import attention, text_model
from xkv.errors import InputError

_REFUSED = {
    "draft_model": "draft_model",
    "kv_bits": "kv_bits",
    "max_kv_size": "max_kv_size",
    "prompt_cache_checkpoint": "apc_manager",
}
"""Arguments of ``generate_step``, and what a user gave to have them."""


def _generate_step_of(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def generate_step(input_ids: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = enabled_state(getattr(model, "language_model", model))
        if enabled is None:
            return original(input_ids, model, *args, **kwargs)
        caches = kwargs["prompt_cache"] = _checked(enabled, kwargs)
        return _generate(original(input_ids, model, *args, **kwargs), caches)

    return generate_step


def _checked(enabled: Enabled, kwargs: dict[str, Any]) -> list[Any]:
    """The prompt cache of a call, a new one if it brings none."""
    for name, option in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise InputError(
                f"{option} does not go with the compressed cache of a model of mlx-vlm: leave it "
                "out, or disable xKV for the model"
            )
    caches = kwargs.get("prompt_cache") or enabled.make_cache()
    enabled.check(caches)
    return caches


def _generate(steps: Iterator[Any], caches: list[Any]) -> Iterator[Any]:
    """An answer, before whose first token an error leaves the cache as it was."""
    with undone_on_error(caches):
        first = next(steps, None)
    if first is not None:
        yield first
        yield from steps


def _make_cache_of(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(original)
    def make_cache(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if enabled_state(text_model(model)) is not None:
            raise InputError(
                "mlx-vlm's batches and its server cannot hold compressed caches: give the model "
                "one prompt at a time with generate or stream_generate, or disable xKV for it"
            )
        return original(model, *args, **kwargs)

    return make_cache


@functools.cache
def _patches() -> tuple[Patch, ...]:
    home = borrowed.module("mlx_vlm.generate.ar")
    return (
        attention(),
        Patch(home, "generate_step", _generate_step_of),
        Patch(home, "_make_cache", _make_cache_of),
    )


def patch_for_vlm(enabled: Enabled) -> Callable[[], Any]:
    """Replace the functions of mlx-vlm, and mlx-lm's, until a model is disabled, or gone.

    Returns:
        Called once, gives them back.
    """
    for patch in _patches():
        patch.install()
    undo = weakref.finalize(enabled, _remove_patches)
    undo.atexit = False
    undo_mlx_lm = patch_for(enabled)
    return lambda: (undo(), undo_mlx_lm())


def _remove_patches() -> None:
    for patch in _patches():
        patch.remove()
