"""A prompt cache as it was, for a prompt or a message that comes to nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import flatten


class Snapshot:
    """A prompt cache, compressed or not, as it is now.

    It costs memory for what is replaced from now on, and for mlx-lm's own caches once they are
    written to.

    Args:
        caches: One cache a layer.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        parts = list(flatten(caches))
        compressed = {id(x.layer.cache): x.layer.cache for x in parts if isinstance(x, XKVCache)}
        self._compressed = [(cache, cache.snapshot()) for cache in compressed.values()]
        self._natives = [x for x in parts if not isinstance(x, XKVCache)]
        # of all at once: what they share stays shared
        self._kept = copy.deepcopy([vars(x) for x in self._natives])

    def restore(self) -> None:
        """Go back to it, in the same objects; once."""
        for cache, snapshot in self._compressed:
            cache.restore(snapshot)
        for native, kept in zip(self._natives, self._kept, strict=True):
            vars(native).clear()
            vars(native).update(kept)


@contextlib.contextmanager
def undone_on_error(caches: Sequence[Any]) -> Iterator[None]:
    """Whatever is raised inside, Ctrl-C included, leaves a prompt cache as it was."""
    before = Snapshot(caches)
    try:
        yield
    except BaseException:
        before.restore()
        raise
