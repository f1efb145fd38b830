"""Mistakes in flags are told before a framework is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xkv.cli.flags import check_early

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
    ("cache_prompt", "--budget 20 --prompt-cache-file x", "must be above the sinks and the window"),
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


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--help --compression 0.5",
        "--compression x",
        "--compression",
        "--some-flag of --mlx-lm",
        "--draft-model a --prompt-cache-file b --help",
        "-p --group-size",
    ],
)
def test_what_is_not_known_early_is_left_to_mlx_lms_parser(flags):
    check_early(flags.split())


def test_a_cache_file_that_is_written_may_name_a_draft_model():
    check_early(["--prompt-cache-file", "b", "--draft-model", "a"], writes_file=True)
