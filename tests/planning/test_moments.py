"""Sums of a calibration on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xkv.planning.moments import Moments


def test_a_piece_counts_once_wherever_the_process_ends(tmp_path, monkeypatch):
    one = np.ones((2, 2))
    for n_renamed in range(4):
        folder = tmp_path / str(n_renamed)
        folder.mkdir()
        moments = Moments(folder)
        moments.add("a", one)
        moments.add("b", one)
        left, replace_file = [n_renamed], Path.replace

        def ending(path, target, left=left, replace_file=replace_file):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace_file(path, target)

        monkeypatch.setattr(Path, "replace", ending)
        with pytest.raises(KeyboardInterrupt):
            moments.commit(pieces=1)
        monkeypatch.setattr(Path, "replace", replace_file)
        again = Moments(folder)
        # not begun, or finished at the next start
        assert again.done["pieces"] == (n_renamed > 0)
        if not again.done["pieces"]:
            again.add("a", one)
            again.add("b", one)
            again.commit(pieces=1)
        np.testing.assert_array_equal(again.load("a"), one)
        np.testing.assert_array_equal(again.load("b"), one)
