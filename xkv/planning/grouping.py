"""Which layers are factored together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from xkv.config import XKVConfig
from xkv.errors import InputError


def make_groups(
    config: XKVConfig, n_layers: int, kinds: Sequence[Hashable | None] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Split a model's layers into groups that share a latent.

    Args:
        config: ``groups`` is taken as it is; otherwise strides of ``group_size`` over the layers
            from ``first_layer`` to ``last_layer`` that can be compressed, the last of which may be
            shorter.
        n_layers: Layers of the model.
        kinds: One entry a layer: only layers with equal entries can share a latent, None marks one
            that cannot be compressed. Left out, all layers are alike.

    Returns:
        Tuples of layer indices; layers in no group stay dense.

    Raises:
        InputError: If a layer does not exist, is named twice or cannot be compressed, a group mixes
            kinds, or no layer is left.
    """
    kinds = [0] * n_layers if kinds is None else kinds
    if config.groups is not None:
        groups = config.groups
        _check_groups(groups, n_layers, kinds)
        return groups
    last = n_layers - 1 if config.last_layer is None else config.last_layer
    chosen = range(config.first_layer, last + 1)
    if last >= n_layers or not chosen:
        raise InputError(
            f"layers {config.first_layer} to {last} cannot be compressed: "
            f"the model has layers 0 to {n_layers - 1}"
        )
    by_kind: dict[Hashable, list[int]] = {}
    for layer in chosen:
        if kinds[layer] is not None:
            by_kind.setdefault(kinds[layer], []).append(layer)
    if not by_kind:
        raise InputError(f"none of the layers {config.first_layer} to {last} can be compressed")
    width = config.group_size
    return tuple(
        sorted(
            tuple(layers[i : i + width])
            for layers in by_kind.values()
            for i in range(0, len(layers), width)
        )
    )


def layers_text(layers: Sequence[int]) -> str:
    """Layers of a group, for people: ``0-3``, or ``0+2`` where they are no run."""
    is_run = len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if is_run else "+".join(map(str, layers))


def _check_groups(
    groups: Sequence[Sequence[int]], n_layers: int, kinds: Sequence[Hashable | None]
) -> None:
    named = [layer for group in groups for layer in group]
    if not named or not all(groups):
        raise InputError("groups must not be empty: name at least one layer in each")
    for layer in named:
        if not 0 <= layer < n_layers:
            raise InputError(f"groups name layer {layer}; the model has layers 0 to {n_layers - 1}")
        if named.count(layer) > 1:
            raise InputError(f"groups name layer {layer} twice")
        if kinds[layer] is None:
            raise InputError(f"groups name layer {layer}, which cannot be compressed")
    for group in groups:
        if len({kinds[layer] for layer in group}) > 1:
            raise InputError(f"layers {tuple(group)} differ in their heads and cannot be a group")
