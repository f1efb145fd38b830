"""The layers that share one latent for keys and one for values."""

from __future__ import annotations

from typing import NamedTuple

from xkv.cache.layer import LayerView
from xkv.cache.rows import LayerRows
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.store.store import ReadRows, Store


class GroupState(NamedTuple):
    """All that a group holds, as one value.

    By position: sinks (dense), the segment (stored), window and tail (dense).
    """

    layers: tuple[LayerRows, ...]
    keys: Store | None = None
    values: Store | None = None
    """None where values are not stored."""
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
    def stores(self) -> list[Store]:
        """Of keys and values, of keys alone (MLA), or none yet."""
        return [x for x in (self.keys, self.values) if x is not None]

    def reader(self, backend: Backend, name: str, first: int) -> ReadRows:
        """Reads the layers' dense "keys", un-rotated, or "values", from number ``first`` on."""

        def read(start: int, end: int) -> list[Array]:
            views = (self.view(backend, index) for index in range(len(self.layers)))
            return [view.plain_rows(name, first + start, first + end) for view in views]

        return read

    @property
    def arrays(self) -> list[Array]:
        """The latents, which belong to no layer."""
        return [x for store in self.stores for x in store.arrays]

    def layer_arrays(self, index: int) -> list[Array]:
        """The arrays of one layer, without the latents and what is the model's."""
        own = [store.basis for store in self.stores if not store.basis.is_shared]
        return [
            *self.layers[index].arrays,
            *(x for basis in own for x in basis.layers[index].arrays),
        ]


class GroupCache:
    """Holds a group's state; replacing it is the one way in which a group changes."""

    def __init__(self, n_layers: int, has_dense_values: bool = False) -> None:
        self.has_dense_values = has_dense_values
        self.state = GroupState((LayerRows(),) * n_layers)

    @property
    def layers(self) -> tuple[LayerRows, ...]:
        return self.state.layers

    @property
    def keys(self) -> Store | None:
        return self.state.keys

    @property
    def values(self) -> Store | None:
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
