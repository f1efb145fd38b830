"""The low-rank cache as transformers' models expect a cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.batches import row_numbers, selected
from xkv.backends.torch_cuda.model.cache_layer import Padding, XKVLayer, storing
from xkv.backends.torch_cuda.model.native_state import crop_native
from xkv.backends.torch_cuda.model.probe import native_layers
from xkv.backends.torch_cuda.model.rollback import CacheState
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import DECODE_TOKENS
from xkv.errors import InputError
from xkv.planning.cache_plan import CachePlan
from xkv.planning.report import Report
from xkv.store.model_basis import ModelBasis


class XKVCache(Cache):
    """A compressed cache for ``model(...)`` and ``model.generate``; see :func:`xkv.torch_cache`.

    Args:
        model_config: Of the model whose rows it will hold.
        plan: What becomes of each layer.
        backend: Does the arithmetic.
        on_progress: Called with (factorizations done, factorizations in all) after each.
        sequences: One low-rank cache for the batch or one a sequence; None makes an empty one.
        basis: The model's own.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        plan: CachePlan,
        backend: TorchBackend,
        on_progress: Callable[[int, int], None] | None = None,
        sequences: Sequence[LowRankCache] | None = None,
        basis: ModelBasis | None = None,
    ) -> None:
        self.plan = plan
        self._basis = basis
        self.backend = backend
        self._model_config = model_config
        self._on_progress = on_progress
        self.padding = Padding()
        self._before: CacheState | None = None
        """What the cache was before the call that is running, or that failed."""
        self.lost: list[str] = []
        """Layers that a failed call left somewhere in it."""
        self.sequences = list(sequences or [self._new_sequence()])
        """The low-rank caches, one for the batch or, where rows are padding, one a sequence."""
        super().__init__(layers=self._new_layers())

    def __deepcopy__(self, memo: dict[int, Any]) -> XKVCache:
        memo[id(self)] = twin = type(self).__new__(type(self))
        with storing():
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def _new_sequence(self) -> LowRankCache:
        return self.plan.lowrank_cache(self.backend, self._on_progress, self._basis)

    def _new_layers(self) -> list[Any]:
        probes = self.plan.probe.caches
        return [
            XKVLayer(
                [cache.layers[i] for cache in self.sequences],
                probes[i].rope,
                not probes[i].reaches_seam,
                self.padding,
            )
            if i in self.sequences[0].layers
            else native
            for i, native in enumerate(native_layers(self._model_config))
        ]

    def reset(self) -> None:
        """Forget everything."""
        whole = self.sequences[0]
        self.padding, self.sequences = Padding(), [self._new_sequence()]
        self.sequences[0].fingerprint = whole.fingerprint
        self.layers = self._new_layers()
        self._before, self.lost = None, []

    def stream(self) -> None:
        """From now on compress a prompt while it streams in, not when it is complete."""
        for cache in self.sequences:
            cache.is_streaming = True

    @property
    def report(self) -> Report:
        """What becomes of each layer; print it."""
        return self.plan.report()

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Rows seen by calls that ended well, padding included; while one runs, of a layer."""
        if layer_idx is None and self._before is not None:
            return self._before.n_rows
        return super().get_seq_length(layer_idx or 0)

    @property
    def batch_size(self) -> int:
        """Sequences, -1 while there are none."""
        if self.padding.is_token is not None:
            return len(self.sequences)
        return next(iter(self.sequences[0].layers.values())).rows.batch or -1

    def begin(self, mask: torch.Tensor | None, batch: int, n_rows: int) -> torch.Tensor | None:
        """Note which of a call's rows are tokens, before its layers run.

        Args:
            mask: ``[B, L]``, 0 where a row is padding; the last ``n_rows`` are the call's.
            batch: Sequences.
            n_rows: Rows of the call.

        Returns:
            The mask of all rows seen and new ones, None if none is padding.
        """
        for sequence in self.sequences:
            # not part of the call: what it replaces need not be kept until the call ends
            if n_rows <= DECODE_TOKENS or sequence.is_streaming:
                with storing():
                    sequence.settle()
        padding = self.padding
        # a single row is a token just chosen: to look at its mask would wait for the device
        is_token = None if mask is None or n_rows == 1 else mask[:, -n_rows:].bool()
        self._before = CacheState.of(self, copies=False)
        if padding.is_token is None and (is_token is None or bool(is_token.all())):
            return None
        try:
            if padding.is_token is None:
                self._split(batch)
            if is_token is None:
                is_token = torch.ones(batch, n_rows, dtype=torch.bool, device=self.backend.device)
            padding.begin(is_token, self._before.n_rows)
        except BaseException:
            self.forget_failed_call()
            raise
        return padding.is_token

    def end(self) -> None:
        """Note that the call ended well."""
        self._before = None

    def forget_failed_call(self) -> None:
        """Go back to what the cache was before a call that did not end well, if there is one."""
        if self._before is not None:
            self.go_back(self._before)

    def go_back(self, state: CacheState) -> None:
        """Be what the cache was."""
        self._before, self.lost = None, state.put_back(self)

    @contextlib.contextmanager
    def unchanged_on_error(self, copies: bool = False) -> Iterator[CacheState]:
        """Inside, whatever goes wrong leaves the cache as it was; gives its state.

        Args:
            copies: See :meth:`CacheState.of`.
        """
        self.forget_failed_call()
        state = CacheState.of(self, copies)
        try:
            yield state
        except BaseException:
            self.go_back(state)
            raise

    @storing()
    def _split(self, batch: int) -> None:
        """From now on keep each sequence by itself, as it would be alone."""
        layers = {i: x for i, x in enumerate(self.layers) if isinstance(x, XKVLayer)}
        if any(layer.parts[0].is_compressed for layer in layers.values()):
            raise InputError(
                "a batch whose prompts were compressed together cannot have padding in a later "
                "turn: begin with a new cache"
            )
        whole = self.sequences[0]
        self.sequences = [self._new_sequence() for _ in range(batch)]
        for cache in self.sequences:
            cache.fingerprint, cache.is_streaming = whole.fingerprint, whole.is_streaming
        for i, layer in layers.items():
            old, layer.parts = layer.parts[0], [cache.layers[i] for cache in self.sequences]
            for row, part in enumerate(layer.parts if old.offset else []):
                rows = old.rows
                keys, values = (x.rows[row : row + 1] for x in (rows.keys, rows.values))
                part.append(keys, values, rows.rope_runs[-1].spec)

    @storing()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows, or all if there are fewer.

        Raises:
            InputError: If the number is positive, or a layer of transformers' own has not kept what
                it would go back to.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): give the number of tokens to forget as a negative one"
            )
        with self.unchanged_on_error(copies=True) as state:
            n_left = max(state.n_rows + tokens_to_remove, 0)
            for i, layer in enumerate(self.layers):
                if isinstance(layer, XKVLayer):
                    layer.crop(n_left - state.n_rows)
                else:
                    crop_native(layer, i, state.n_rows, n_left)
            if self.padding.is_token is not None:
                self.padding.is_token = self.padding.is_token[:, :n_left]

    @storing()
    def batch_select_indices(self, indices: Any) -> None:
        """Keep these sequences, in this order, some of them repeatedly.

        Raises:
            InputError: If one is out of range, or none is left.
        """
        batch = self.batch_size
        if batch < 0:
            return
        rows = row_numbers(indices, batch)
        if rows == list(range(batch)):
            return
        numbers: Any = torch.tensor(rows, device=self.backend.device)
        with self.unchanged_on_error(copies=True):
            if self.padding.is_token is not None:
                chosen = [self.sequences[i] for i in rows]
                self.sequences = [
                    copy.deepcopy(x) if x in chosen[:i] else x for i, x in enumerate(chosen)
                ]
                self.padding.is_token = self.padding.is_token[rows]
            else:
                for group in self.sequences[0].groups:
                    group.state = selected(group.state, numbers)
            for i, layer in enumerate(self.layers):
                if isinstance(layer, XKVLayer):
                    layer.parts = [x.layers[i] for x in self.sequences]
                else:
                    layer.reorder_cache(numbers)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, for several answers to one prompt."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the sequences that beam search goes on with."""
        self.batch_select_indices(beam_idx)

    def offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: nothing waits for rows to come back.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "the layers of a compressed cache stay on the model's device: use a higher compression"
        )

    prefetch = offload

    @property
    def notice(self) -> str | None:
        """What was not done as asked, in a sentence."""
        return self.sequences[0].notice

    @property
    def factorize_seconds(self) -> float:
        return sum(cache.factorize_seconds for cache in self.sequences)

    def _native_bytes(self) -> int:
        native = [layer for layer in self.layers if not isinstance(layer, XKVLayer)]
        rows = [getattr(layer, name, None) for layer in native for name in ("keys", "values")]
        return sum(x.nbytes for x in rows if x is not None)

    def dense_bytes(self) -> int:
        """What the tokens take in the full cache."""
        return self._native_bytes() + sum(cache.dense_bytes() for cache in self.sequences)

    def held_bytes(self) -> int:
        """What they take here, by the sizes of all arrays."""
        return self._native_bytes() + sum(cache.held_bytes() for cache in self.sequences)
