"""What stands in a page of the documentation: examples, command lines, links, prose."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE_PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
"""Whose examples run."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A) {4}[^\n]*\n(?: {4}[^\n]*\n|\n(?= {4}))*")
_INLINE = re.compile(r"(`+)(.+?)\1", re.S)
_COMMAND = re.compile(r"(python -m (xkv|scripts)\.|python scripts/|bash scripts/)")


@dataclass(frozen=True)
class Block:
    """Lines of a page that are no prose.

    Args:
        language: Of a fence; empty for one without, and for indented lines.
        text: The lines, not indented.
        line: Of the page, from 1, that the first one is.
    """

    language: str
    text: str
    line: int


def blank(found: re.Match[str]) -> str:
    """Nothing, on as many lines."""
    return "\n" * found[0].count("\n")


def blocks_of(text: str) -> list[Block]:
    """Fenced and indented blocks in their order."""

    found = []
    for fence in _FENCE.finditer(text):
        lines = [line.removeprefix(fence[1]) for line in fence[3].splitlines()]
        found.append(Block(fence[2], "\n".join(lines), _line(text, fence.start(3))))
    rest = _FENCE.sub(blank, text)
    for indented in _INDENTED.finditer(rest):
        lines = [line.removeprefix(" " * 4) for line in indented[0].splitlines()]
        found.append(Block("", "\n".join(lines), _line(rest, indented.start())))
    return sorted(found, key=lambda block: block.line)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def prose_of(text: str) -> str:
    """The text without its blocks; lines stay where they are."""
    return _INDENTED.sub(blank, _FENCE.sub(blank, text))


def inline_code(text: str) -> list[str]:
    """Code in the prose; a line's end in it is a space."""
    return [" ".join(found[2].split()) for found in _INLINE.finditer(prose_of(text))]


def without_code(text: str) -> str:
    """The prose without code in it."""
    return _INLINE.sub(lambda found: "`" * 2 + blank(found), prose_of(text))


def commands_of(text: str) -> list[str]:
    """Command lines of ours, each once: of blocks, and of code in the prose."""
    lines: list[str] = []
    for block in blocks_of(text):
        if block.language == "python":
            continue
        shown = block.text.replace("\\\n", " ").splitlines()
        # what follows a prompt is what the command prints
        typed = [line[2:] for line in shown if line.startswith("$ ")] or shown
        lines += [part for line in typed for part in line.split("&&")]
    lines += inline_code(text)
    found = {}
    for line in lines:
        command = re.sub(r"^(\w+=\S+ )+", "", " ".join(line.split()))
        if _COMMAND.match(command):
            found[shlex.join(_words(command))] = None
    return list(found)


def _words(command: str) -> list[str]:
    """Without a comment and without redirections."""
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word[0] in "<>|"]
    return words[: ends[0]] if ends else words
