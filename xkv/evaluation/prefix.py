"""A document's rows as a method gives them back, which many questions share."""

from __future__ import annotations

from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import PromptLayer


class Prefix(PromptLayer):
    """A document's rows as a method gives them back, shared by a batch of questions.

    Args:
        backend: Does the arithmetic.
        keys: ``[1, n_kv_heads, S, head_dim]``, rotated; fewer rows than tokens where a method
            drops some. In the dtype of the arithmetic.
        values: ``[1, n_kv_heads, S, value_dim]``.
        n_tokens: Tokens of the document.
    """

    def __init__(self, backend: Backend, keys: Array, values: Array, n_tokens: int) -> None:
        super().__init__(backend, n_tokens)
        self.prefix_keys, self.prefix_values = keys, values

    def select(self, queries: Array, scale: float) -> Array | None:
        """Rows that each question attends to, ``[1 or B, n_kv_heads, S]``, or None for all.

        Or those of each query, ``[B, n_kv_heads, n_heads // n_kv_heads * Lq, S]``.

        Called with every call's queries ``[B, n_heads, Lq, head_dim]``: first those of the
        questions, then those of single tokens.
        """
        return None

    def attend(
        self, queries: Array, scale: float, mask: Array | None, sinks: Array | None = None
    ) -> Array:
        """Every question sees the document and its own tokens up to the newest, in order.

        ``mask`` is by position and says the same.
        """
        xp = self.backend.xp
        batch, n_heads, n_queries, _ = queries.shape
        n_kv_heads, n_rows = self.prefix_keys.shape[1:3]
        selected = self.select(queries, scale)
        grouped = xp.reshape(queries * scale, (batch, n_kv_heads, -1, queries.shape[-1]))
        n_grouped = grouped.shape[2]

        # one product for all questions: the document is read once
        together = xp.reshape(
            xp.permute_dims(grouped, (1, 0, 2, 3)), (n_kv_heads, -1, queries.shape[-1])
        )
        before = together @ xp.matrix_transpose(self.prefix_keys[0])
        before = xp.reshape(before, (n_kv_heads, batch, n_grouped, n_rows))
        before = xp.permute_dims(before, (1, 0, 2, 3))
        since = grouped @ xp.matrix_transpose(self.keys)
        lowest = xp.finfo(since.dtype).min
        if selected is not None:
            selected = selected if selected.ndim == 4 else selected[:, :, None]
            before = xp.where(selected, before, lowest)
        if n_queries > 1:
            n_since = self.keys.shape[-2]
            rows = self.backend.positions(n_since - n_queries, n_queries)
            is_past = rows[:, None] >= self.backend.positions(0, n_since)
            per_head = xp.reshape(since, (batch, n_heads, n_queries, n_since))
            since = xp.reshape(xp.where(is_past, per_head, lowest), since.shape)
        scores = xp.concat([before, since], axis=-1)
        weights = xp.softmax(xp.astype(scores, self.backend.accumulate_dtype(queries)), -1)
        weights = xp.astype(weights, queries.dtype)

        on_document = xp.permute_dims(weights[..., :n_rows], (1, 0, 2, 3))
        on_document = xp.reshape(on_document, (n_kv_heads, -1, n_rows)) @ self.prefix_values[0]
        on_document = xp.reshape(on_document, (n_kv_heads, batch, n_grouped, -1))
        output = xp.permute_dims(on_document, (1, 0, 2, 3)) + weights[..., n_rows:] @ self.values
        return xp.reshape(output, (batch, n_heads, n_queries, -1))
