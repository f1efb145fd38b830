"""``python -m xkv.parity``: everything within its tolerance here, and a fault that it must find."""

from __future__ import annotations

import pytest

from xkv import parity
from xkv.backends.mlx_metal import MLXBackend
from xkv.checks.operations import OPERATIONS


def test_parity_passes_on_this_machine(capsys):
    parity.main(["--max-tokens", "2"])
    output = capsys.readouterr().out
    assert "errors are within their tolerances" in output and "MISS" not in output
    for name in OPERATIONS:
        assert f"\n{name} " in output


def test_planted_fault_is_a_miss_and_exit_code_1(capsys, monkeypatch):
    rope = MLXBackend.rope
    monkeypatch.setattr(
        MLXBackend, "rope", lambda self, x, start, *args: rope(self, x, start + 1, *args)
    )
    monkeypatch.setattr(parity, "compare_generation", lambda *args: [])
    with pytest.raises(SystemExit) as stop:
        parity.main([])
    assert stop.value.code == 1
    misses = [line for line in capsys.readouterr().out.splitlines() if "MISS" in line]
    assert any(line.startswith("attend_all") for line in misses)
    assert not any("torch" in line for line in misses)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/nowhere"], "error: transformers cannot load /nowhere"),
        (["--max-tokens", "0"], "error: --max-tokens 0 must be at least 1"),
    ],
)
def test_users_mistake_is_one_sentence_and_exit_code_2(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(parity, "compare_operations", lambda backends: [])
    with pytest.raises(SystemExit) as stop:
        parity.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
