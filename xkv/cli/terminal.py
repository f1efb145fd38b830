"""What every command line shares: errors in a sentence, progress bars, sizes for people."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

from xkv.errors import InputError


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one sentence on stderr: exit code 2 for a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def size_text(n_bytes: float) -> str:
    """Bytes for people, in decimal units like mlx-lm's."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.3f} GB"
    return f"{n_bytes / 1e6:.3f} MB"


_UNITS = {"prefill": "token", "factorize": "factor", "calibrate": "text"}


class ProgressBars:
    """One bar on stderr for each phase, all closed before the answer begins."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def update(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of a phase are done."""
        if phase not in self._bars:
            unit = _UNITS.get(phase, "step")
            self._bars[phase] = tqdm(
                total=total, desc=phase, unit=unit, file=sys.stderr, leave=False, delay=0.5
            )
        self._bars[phase].update(done - self._bars[phase].n)

    def write(self, text: str) -> None:
        """Print a piece of the answer."""
        self.close()
        print(text, end="", flush=True)

    def close(self) -> None:
        while self._bars:
            self._bars.popitem()[1].close()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
