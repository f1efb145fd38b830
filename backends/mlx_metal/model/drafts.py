"""How many of a draft model's tokens the model takes."""

from __future__ import annotations

from dataclasses import dataclass

N_DRAFTS = 2
"""mlx-lm's default of ``num_draft_tokens``."""


@dataclass
class DraftCount:
    """Of one answer, counted as its tokens come.

    Args:
        n_at_a_time: Tokens that are drafted at a time.
        max_tokens: Of the answer; near its end fewer are drafted.
    """

    n_at_a_time: int
    max_tokens: int
    n_tokens: int = 0
    n_taken: int = 0
    n_drafted: int = 0
    """Without those behind the answer's end."""
    _n_open: int = 0
    """Taken since the model's last own token."""

    def count(self, from_draft: bool) -> None:
        """Count a token of the answer; the model's own comes after what was drafted before it."""
        if from_draft:
            self._n_open += 1
            self.n_taken += 1
            self.n_drafted += 1
        else:
            begin = self.n_tokens - self._n_open
            self.n_drafted += min(self.n_at_a_time, self.max_tokens - begin) - self._n_open
            self._n_open = 0
        self.n_tokens += 1
