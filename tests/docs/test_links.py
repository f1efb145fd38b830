"""Links, anchors and names of files in the documentation exist; the README has no loose figures."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import EXAMPLE_PAGES, ROOT, blank, inline_code, prose_of, without_code

README = ROOT / "README.md"
PAGES = [*EXAMPLE_PAGES, ROOT / "BENCHMARKS.md", ROOT / "backends" / "mlx_metal" / "SUPPORT.md"]
MOST_LINES = 150
FOLDERS = ("xkv/", "backends/", "tests/", "scripts/", "docs/", ".ci/")
"""A name in code that begins with one of these is a path of ours."""

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.M)
_PATH = re.compile(r"[\w.*/-]+")
_SOURCE = re.compile(r"[\w./-]+\.(py|md|sh|toml|cpp)")
_GENERATED = re.compile(r"<!-- results: .*?<!-- end -->", re.S)
_UNIT = r"(?:x\b|%|[kMG]B\b|m?s\b|(?:second|minute|hour|time)s?\b|tokens? a )"
_FIGURE = re.compile(rf"\b0\.\d\d+\b(?!\.\d)|\b\d[\d,.]*\s?{_UNIT}")
ALLOWED: tuple[str, ...] = ()
"""Texts of the README with numbers that nobody measured."""


def tracked() -> set[str]:
    """Files of the project, those that are not committed yet too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    return set(listed.stdout.splitlines())


def anchors_of(text: str) -> set[str]:
    """What GitHub calls a page's headings."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose_of(text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found


def broken_links(page: Path) -> list[str]:
    """Links and pictures of a page that lead nowhere in the project."""
    broken = []
    for link in _LINK.findall(without_code(page.read_text())):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_there = target.exists()
        if is_there and anchor:
            is_there = target.suffix == ".md" and anchor in anchors_of(target.read_text())
        if not is_there:
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """Names in code that look like files of the project, and are none."""
    files = tracked()
    folders = {str(parent) for file in files for parent in Path(file).parents}
    names = {Path(file).name for file in files}
    missing = []
    for code in inline_code(text):
        words = [word for word in code.split() if _PATH.fullmatch(word) and "NAME" not in word]
        for word in words:
            name = word.rstrip("/").removeprefix("./")
            is_ours = word.startswith(FOLDERS)
            if not is_ours and not (_SOURCE.fullmatch(word) and len(words) == 1):
                continue
            # in the house's list a name may leave out the room that it stands in
            places = [name, f"xkv/{name}"]
            is_there = any(
                place in files or place in folders or ("*" in place and any(ROOT.glob(place)))
                for place in places
            )
            if not is_there and (is_ours or "/" in name or name not in names):
                missing.append(word)
    return missing


def loose_figures(text: str) -> list[str]:
    """Measured figures of a page outside of what is generated, and outside of code."""
    prose = without_code(_GENERATED.sub(blank, text))
    for allowed in ALLOWED:
        prose = prose.replace(allowed, "")
    return _FIGURE.findall(prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page):
    assert missing_files(page.read_text()) == []


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_readme_has_figures_only_where_they_are_generated():
    assert loose_figures(README.read_text()) == []


def test_every_page_is_linked_from_the_readme_or_a_page():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in EXAMPLE_PAGES
        for link in _LINK.findall(without_code(page.read_text()))
    }
    assert [page.name for page in EXAMPLE_PAGES if page != README and page not in linked] == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("# A b\n\n[x](#a-b) [y](other.md#two-words-1) ![z](a.png) [w](https://a.b/c)", []),
        ("# A b\n\n[x](#a_b) ![z](b.png)", ["#a_b", "b.png"]),
        ("[x](other.md#three)\n\n    [y](in-a-block.md)\n\n`[z](in-code.md)`", ["other.md#three"]),
        ("```sh\n# no heading\n```\n\n[x](#no-heading)", ["#no-heading"]),
    ],
)
def test_broken_links_are_found(text, broken, tmp_path):
    (tmp_path / "other.md").write_text("# Two `words`!\n\n## [Two words](x.md)\n")
    (tmp_path / "a.png").write_bytes(b"")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert broken_links(page) == broken


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`xkv/config.py`, `xkv/ops/`, `backends/*/kernels`, `cache/steps.py`, `chips.py`", []),
        (
            "`meta-llama/Llama-3.1-8B`, `config.json`, `~/.cache`, `OUT/bench`, `tests/NAME.py`",
            [],
        ),
        ("`xkv/konfig.py` and `python scripts/bench.py`", ["xkv/konfig.py", "scripts/bench.py"]),
        ("`cache/stairs.py`, `chip.py`, `README.md`", ["cache/stairs.py", "chip.py"]),
        ("`scripts/results/nothing.json`", ["scripts/results/nothing.json"]),
    ],
)
def test_missing_files_are_found(text, missing):
    assert missing_files(text) == missing


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("an error of 0.0077, 8.4 s, 12 %, 4.03x", ["0.0077", "8.4 s", "12 %", "4.03x"]),
        ("3 times, 1,024 MB and 16x\nless", ["3 times", "1,024 MB", "16x"]),
        ("[arXiv 2503.18893](x), 16 bits, mlx-lm 0.32.2, `--compression 8 x`, SmolLM2-135M", []),
        ("<!-- results: a -->\n| 4.0 x |\n<!-- end -->\n\n    5 s\n\n6 s", ["6 s"]),
    ],
)
def test_loose_figures_are_found(text, figures):
    assert loose_figures(text) == figures
