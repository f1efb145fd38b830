"""The layers that share one latent for keys and one for values."""

from __future__ import annotations

from typing import NamedTuple

from xkv.cache.layer import LayerView
from xkv.cache.rows import LayerRows
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.store.factors import SharedFactors


class GroupState(NamedTuple):
    """All that a group holds, as one value.

    By position: sinks (dense), the segment, recent rows (both factored), window and tail (dense).
    """

    layers: tuple[LayerRows, ...]
    keys: SharedFactors | None = None
    values: SharedFactors | None = None
    """None where values are not factored."""
    retry_at: int = 0
    """Tokens from which on compression is worth another look."""

    def with_layer(self, index: int, rows: LayerRows) -> GroupState:
        """The same with other rows of one layer."""
        layers = (*self.layers[:index], rows, *self.layers[index + 1 :])
        return self._replace(layers=layers)

    def view(self, backend: Backend, index: int) -> LayerView:
        """One layer, to read."""
        return LayerView(backend, self.layers[index], self.keys, self.values, index)

    @property
    def is_in_step(self) -> bool:
        """Whether all layers have seen the same tokens, and some."""
        offsets = {layer.offset for layer in self.layers}
        return len(offsets) == 1 and offsets != {0}

    @property
    def factors(self) -> list[SharedFactors]:
        """What is factored: keys and values, keys alone (MLA), or nothing yet."""
        return [x for x in (self.keys, self.values) if x is not None]

    @property
    def arrays(self) -> list[Array]:
        """The latents, which belong to no layer."""
        return [x for factors in self.factors for x in factors.arrays]

    def layer_arrays(self, index: int) -> list[Array]:
        """The arrays of one layer, without the latents."""
        bases = [x for factors in self.factors for x in factors.bases[index].arrays]
        return [*self.layers[index].arrays, *bases]


class GroupCache:
    """Holds a group's state; replacing it is the one way in which a group changes."""

    def __init__(self, n_layers: int, has_dense_values: bool = False) -> None:
        self.has_dense_values = has_dense_values
        self.state = GroupState((LayerRows(),) * n_layers)

    @property
    def layers(self) -> tuple[LayerRows, ...]:
        return self.state.layers

    @property
    def keys(self) -> SharedFactors | None:
        return self.state.keys

    @property
    def values(self) -> SharedFactors | None:
        return self.state.values

    @property
    def start(self) -> int:
        """Position of the segment's first row."""
        return self.state.layers[0].start

    @property
    def is_compressed(self) -> bool:
        return self.state.layers[0].is_compressed

    def arrays(self) -> list[Array]:
        """The latents, counted once for the group."""
        return self.state.arrays
