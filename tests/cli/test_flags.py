"""Mistakes in flags are told before a framework is imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from xkv.cli import mlx_flags

PROGRAM = """
import runpy, sys
sys.argv[1:] = {arguments!r}
try:
    runpy.run_module("xkv.{command}", run_name="__main__")
except SystemExit as stop:
    print(stop.code, *sys.modules)
"""
HEAVY = {"mlx", "mlx_lm", "torch", "transformers", "matplotlib", "huggingface_hub"}
MISTAKES = [
    ("generate", "--compression 0.5", "compression=0.5 must be above 1"),
    ("generate", "--backend torch --compression 0.5", "compression=0.5 must be above 1"),
    ("generate", "--draft-model a --prompt-cache-file b", "--draft-model needs the whole prompt"),
    ("chat", "--max-tokens 0", "--max-tokens 0 must be at least 1"),
    ("chat", "--max-kv-size 100", "--max-kv-size changes mlx-lm's own cache"),
    ("server", "--prefill-step-size 4", "must be above 16"),
    (
        "cache_prompt",
        "--budget 20 --prompt-cache-file x --prompt a",
        "must be above the sinks and the window",
    ),
    ("generate", "--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("generate", "--max-tokens x", "invalid int value: 'x'"),
    ("chat", "--compression x", "invalid float value: 'x'"),
    ("server", "--port", "expected one argument"),
    ("server", "--prompt-cache-bytes many", "invalid _parse_size value: 'many'"),
    ("server", "--prompt-cache-bytes 3XB", "invalid _parse_size value: '3XB'"),
    ("cache_prompt", "--prompt a", "required: --prompt-cache-file"),
    ("plan", "--memory -1", "--memory"),
    ("parity", "--max-tokens 0", "--max-tokens 0"),
    ("doctor", "--lengths 0", "--lengths 0 must be at least 256"),
    ("doctor", "--lengths x", "invalid int value"),
    ("calibrate", "--group-size 0", "--group-size 0 must be at least 1"),
    ("evaluate", "--samples 0", "--samples 0"),
    ("inspect", "--group-size 0", "nothing to inspect"),
]


@pytest.mark.parametrize(("command", "flags", "words"), MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(command, flags, words):
    program = PROGRAM.format(command=command, arguments=flags.split())
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    code, *modules = run.stdout.split()
    assert code == "2"
    assert words in run.stderr.strip().splitlines()[-1]
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("command", ["generate", "chat", "server", "cache_prompt"])
def test_help_is_that_of_mlx_lms_own_parser(command, capsys, monkeypatch):
    texts = []
    for is_found in (True, False):
        if not is_found:
            # as if mlx-lm's source could not be read: its import answers
            monkeypatch.setattr(mlx_flags, "_main_of", lambda command: None)
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"xkv.{command}").main(["--help"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"usage: python -m xkv.{command} ") and "--compression" in texts[0]


@pytest.mark.parametrize(
    "line",
    ["generate --compression 8", "chat", "server", "cache_prompt --prompt a"],
)
def test_flags_that_can_be_met_are_parsed_and_nothing_is_done(line, monkeypatch):
    command, *flags = line.split()
    writes_file = command == "cache_prompt"
    flags += ["--prompt-cache-file", "b"] * writes_file
    parsed = []
    check_flags = mlx_flags.check_flags

    def check(args, *others):
        parsed.append(args)
        return check_flags(args, *others)

    monkeypatch.setattr(mlx_flags, "check_flags", check)
    before = list(sys.argv)
    mlx_flags.check_early(command, flags, writes_file=writes_file)
    assert sys.argv == before and len(parsed) == 1 and parsed[0].max_tail


def test_a_source_that_is_not_as_it_was_is_left_to_mlx_lm(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(mlx_flags.importlib.util, "find_spec", lambda name: spec)
    mlx_flags.check_early("generate", ["--no-such-flag"])
    (tmp_path / "generate.py").write_text("def main():\n    moved_elsewhere()\n")
    mlx_flags.check_early("generate", ["--no-such-flag"])
    text = "import argparse\ndef main():\n    argparse.ArgumentParser().parse_args()\n"
    (tmp_path / "generate.py").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        mlx_flags.check_early("generate", ["--no-such-flag"])
