"""What a page lists is all that there is."""

from __future__ import annotations

import argparse
import re

import pytest

from tests.docs.pages import ROOT, inline_code
from xkv.__main__ import COMMANDS
from xkv.cli.flags import add_compression_flags
from xkv.evaluation.kl import KL
from xkv.evaluation.methods import NAMES
from xkv.evaluation.tasks import TASKS


def words_of(text: str) -> set[str]:
    """Code in the prose, and its words: a method without its options, a flag without its value."""
    codes = inline_code(text)
    return {word for code in codes for word in re.split(r"[:= ]", code)} | set(codes)


def flags() -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_compression_flags(parser)
    return [action.option_strings[0] for action in parser._actions]


LISTS = {
    "methods": ("evaluation.md", NAMES),
    "tasks": ("evaluation.md", [*TASKS, KL]),
    "commands": ("commands.md", [f"python -m xkv.{name}" for name in COMMANDS]),
    "flags": ("commands.md", [*flags(), "--no-calibration"]),
}


@pytest.mark.parametrize(("page", "names"), LISTS.values(), ids=LISTS)
def test_page_lists_all(page, names):
    listed = words_of((ROOT / "docs" / page).read_text())
    assert len(names) > 5 and [name for name in names if name not in listed] == []


def test_what_a_page_leaves_out_is_seen():
    assert words_of("| `quantized:bits=4` | `--rank-k 3 --rank-v 8` |") >= {"quantized", "--rank-v"}
    assert not words_of("    quest\n\nquest") & {"quest"}
