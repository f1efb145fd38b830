"""Where a text ends for a client."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Cuts a text that comes piece by piece before the first stop string in it.

    What may be the beginning of a stop string is held back, so that the answer does not depend on
    where pieces end.

    Args:
        stops: Strings; an empty one stops nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.is_found = False
        self.found: str | None = None
        """The stop string that the text was cut at."""

    def add(self, piece: str) -> str:
        """Take a piece; returns the text that is certain to be part of the answer."""
        self._held += piece
        found, begun = self._found(), self._begun()
        # a stop string that begins before the one that is complete would come first
        self.is_found = found < min(begun + 1, len(self._held))
        return self._release(min(found, begun))

    def end(self) -> str:
        """The rest of the answer, when no more text comes."""
        found = self._found()
        self.is_found = self.is_found or found < len(self._held)
        return self._release(found)

    def _found(self) -> int:
        """Where the first complete stop string begins, or the end."""
        places = (self._held.find(stop) for stop in self._stops)
        return min((i for i in places if i >= 0), default=len(self._held))

    def _begun(self) -> int:
        """Where the first stop string begins that more text may complete, or the end."""
        n = len(self._held)
        for i in range(max(n - self._longest + 1, 0), n):
            if any(stop.startswith(self._held[i:]) for stop in self._stops):
                return i
        return n

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        if self.is_found:
            self.found = next(stop for stop in self._stops if self._held.startswith(stop))
            self._held = ""
        return text
