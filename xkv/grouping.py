"""Which layers are factored together."""

from __future__ import annotations

from xkv.config import XKVConfig
from xkv.errors import InputError


def make_groups(config: XKVConfig, n_layers: int) -> tuple[tuple[int, ...], ...]:
    """Split a model's layers into groups that share a latent.

    Args:
        config: ``groups`` is taken as it is; otherwise strides of ``group_size`` from
            ``first_layer`` to ``last_layer``, the last of which may be shorter.
        n_layers: Layers of the model.

    Returns:
        Tuples of layer indices; layers in no group stay dense.

    Raises:
        InputError: If a layer does not exist or is named twice, or no layer is left.
    """
    if config.groups is not None:
        groups = config.groups
    else:
        last = n_layers - 1 if config.last_layer is None else config.last_layer
        layers = range(config.first_layer, last + 1)
        if last >= n_layers or not layers:
            raise InputError(
                f"layers {config.first_layer} to {last} cannot be compressed: "
                f"the model has layers 0 to {n_layers - 1}"
            )
        width = config.group_size
        groups = tuple(tuple(layers[i : i + width]) for i in range(0, len(layers), width))
    named = [layer for group in groups for layer in group]
    if not named or not all(groups):
        raise InputError("groups must not be empty: name at least one layer in each")
    for layer in named:
        if not 0 <= layer < n_layers:
            raise InputError(f"groups name layer {layer}; the model has layers 0 to {n_layers - 1}")
        if named.count(layer) > 1:
            raise InputError(f"groups name layer {layer} twice")
    return groups
