"""What is known of a conversation on disk, and which prompts it serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conversation:
    """What is known of a conversation without reading its blocks.

    Args:
        name: Of its file.
        identity: Of the model and the options it was computed with.
        tokens: All of them.
        back_to: To which numbers of its tokens it can go back, None for any.
        blocks: Names and bytes of its blocks' files, in order.
    """

    name: str
    identity: str
    tokens: np.ndarray
    back_to: list[int] | None
    blocks: list[tuple[str, int]]

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(size for _, size in self.blocks)

    def serves(self, identity: str, tokens: np.ndarray, at_most: int) -> int:
        """With how many of some tokens, no more than ``at_most``, it can go on."""
        if identity != self.identity:
            return 0
        most = min(at_most, len(self.tokens))
        differing = np.flatnonzero(tokens[:most] != self.tokens[:most])
        common = int(differing[0]) if differing.size else most
        if common == len(self.tokens) or self.back_to is None:
            return common
        return max((x for x in self.back_to if x <= common), default=0)

    def replaces(self, identity: str, tokens: np.ndarray) -> bool:
        """Whether it serves whatever a conversation of these tokens would."""
        return self.serves(identity, tokens, len(tokens)) == len(tokens)
