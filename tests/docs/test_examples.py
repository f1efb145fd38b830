"""Every example of the documentation: Python runs, command lines run or are at least parsed."""

from __future__ import annotations

import functools
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
import transformers

from tests.docs.pages import EXAMPLE_PAGES, ROOT, blocks_of, commands_of
from xkv.errors import InputError
from xkv.tiny import CHECKPOINT_DIR

SHORT = ["--prompt", "Anna sold red hats. " * 9]
RUN = {
    r"-m xkv\.generate\b": ([], [*SHORT, "--max-tokens", "2"]),
    r"-m xkv\.cache_prompt\b": ([*SHORT, "--prompt-cache-file", "made.safetensors"], []),
    r"-m xkv\.(chat|plan)\b": ([], []),
}
"""Command lines that run: flags before theirs, which they may change, and after, which count."""

NOT_RUN = {
    r"-m xkv\.server\b": "runs until it is stopped",
    r"-m xkv\.(calibrate|doctor|evaluate|inspect|parity)\b": "takes a minute; it has its own tests",
    r"-m scripts\.real_model\b": "downloads a model",
    r"scripts/(bench_gpu|check_gpu|gpu_step|parity_gpu)\.": "is for a GPU",
    r"scripts[./]bench_(batches|decode|fidelity|first_run|prefill|prefixes)\b": "takes minutes",
    r"scripts[./](calibrate_tiny|eval_turns|golden_tokens)\b": "takes minutes",
    r"scripts[./](fuzz_server|soak_server)\b": "takes minutes",
    r"scripts[./](support_table|talk_mlx|talk_torch|train_tiny|try_everything)\b": "takes minutes",
    r"scripts[./](add_result|summarize_results)\b": "changes files of the project",
    r"scripts[./]mlx_lm_tests\b": "needs a checkout of mlx-lm",
    r"scripts/try_vlm\.": "makes an environment",
}
"""Why others do not; their flags are parsed all the same."""

OF_MLX_LM = ("xkv.generate", "xkv.chat", "xkv.server", "xkv.cache_prompt")
"""Modules whose flags are mlx-lm's and ours."""

TYPED = "Anna sold red hats.\nq\n"
"""On the terminal of every command that runs."""


class ParsedError(Exception):
    """A command has parsed its flags."""


def is_any(patterns: Any, command: str) -> str | None:
    """The pattern that a command line matches, if one does."""
    found = [pattern for pattern in patterns if re.search(pattern, command)]
    assert len(found) < 2, f"{command}: {found}"
    return found[0] if found else None


def local(name: Any) -> str:
    """A directory in a repository's place."""
    return str(name) if Path(name).is_dir() else str(CHECKPOINT_DIR)


LOADERS = (
    (mlx_lm, "load"),
    (transformers.AutoModelForCausalLM, "from_pretrained"),
    (transformers.AutoTokenizer, "from_pretrained"),
)


def loading_locally(load: Any) -> Any:
    """A loader that finds every repository on the disk."""

    @functools.wraps(load)
    def from_local(name, *args, **options):
        return load(local(name), *args, **options)

    return from_local


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the files that examples name; models are the bundled one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    shutil.copy(CHECKPOINT_DIR / "xkv-profile.json", tmp_path)
    for home, name in LOADERS:
        monkeypatch.setattr(home, name, loading_locally(getattr(home, name)))
    return tmp_path


def run_examples(page: Path) -> int:
    """Run a page's Python in one namespace; errors name the page and the line."""
    names: dict[str, Any] = {"__name__": "__example__"}
    blocks = [block for block in blocks_of(page.read_text()) if block.language == "python"]
    for block in blocks:
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    return len(blocks)


def run_command(command: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m`` in this process, on the bundled model."""
    _, _, module, *flags = shlex.split(command)
    before, after = RUN[pattern]
    words = [*before, *flags, *after]
    for i, word in enumerate(words[:-1]):
        if word == "--model":
            words[i + 1] = local(words[i + 1])
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, f"{command}: exit code {ended.code}"


def parse_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does with its flags before anything else."""
    start, *words = shlex.split(command)
    if start == "bash":
        assert (ROOT / words[0]).is_file(), f"{command}: there is no such file"
        return
    if words[0] == "-m":
        name, words = words[1], words[2:]
    else:
        name, words = words[0].removesuffix(".py").replace("/", "."), words[1:]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise AssertionError(f"{command}: {error}") from error
    try:
        parse(name, module, words, monkeypatch)
    except (SystemExit, InputError) as refused:
        raise AssertionError(f"{command} is refused") from refused


def parse(name: str, module: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_on_torch = name == "xkv.generate" and "torch" in words
    if name in OF_MLX_LM and not is_on_torch:

        def stop():
            raise ParsedError

        monkeypatch.setattr(module, "load_mlx", stop)
        with pytest.raises(ParsedError):
            module.main(words)
        return
    if not hasattr(module, "setup_arg_parser"):
        assert not words, f"{name} takes no flags"
        return
    if name in ("scripts.soak_server", "scripts.fuzz_server"):
        _, words = module.setup_arg_parser().parse_known_args(words)
        parse("xkv.server", importlib.import_module("xkv.server"), words, monkeypatch)
        return
    args = module.setup_arg_parser().parse_args(words)
    if name == "xkv.evaluate":
        module.choose_tasks(args)
        module.make_settings(args.methods or [], args.ratios or [])


def check_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run or parse every command line of a page."""
    commands = commands_of(page.read_text())
    for command in commands:
        run, not_run = is_any(RUN, command), is_any(NOT_RUN, command)
        assert bool(run) != bool(not_run), f"{page.name}: say in RUN or NOT_RUN what {command} is"
        with monkeypatch.context() as here:
            if run:
                run_command(command, run, here)
            else:
                parse_command(command, here)
    return commands


@pytest.mark.parametrize("page", EXAMPLE_PAGES, ids=lambda page: page.stem)
def test_examples_run(page, place):
    run_examples(page)


@pytest.mark.parametrize("page", EXAMPLE_PAGES, ids=lambda page: page.stem)
def test_commands_are_ones(page, place, monkeypatch):
    check_commands(page, monkeypatch)


def test_pages_have_examples_and_commands():
    texts = [page.read_text() for page in EXAMPLE_PAGES]
    assert sum(block.language == "python" for text in texts for block in blocks_of(text)) >= 5
    commands = {command for text in texts for command in commands_of(text)}
    for pattern in (*RUN, *NOT_RUN):
        assert is_any(RUN | NOT_RUN, next(c for c in commands if re.search(pattern, c))) == pattern


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2, x\n```\n", AssertionError, "1"),
        ("```python\nimport xkv\nxkv.compress(3)\n```\n", AttributeError, "compress"),
        ("\n```python\nx =\n```\n", SyntaxError, "page.md, line 3"),
    ],
)
def test_broken_example_fails(text, error, message, place):
    page = place / "page.md"
    page.write_text(text)
    with pytest.raises(error, match=message):
        run_examples(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("    python -m xkv.nonsense\n", "say in RUN or NOT_RUN what python -m xkv.nonsense is"),
        ("`python scripts/nonsense.py`", "say in RUN or NOT_RUN"),
        ("    $ python -m xkv.evaluate --quik\n    3 s\n", "--quik is refused"),
        ("`python -m xkv.evaluate --tasks\nneedles`", "--tasks needles is refused"),
        ("    python -m xkv.evaluate \\\n      --methods xkw\n", "--methods xkw is refused"),
        ("    python -m xkv.server --port many\n", "many is refused"),
        ("    python -m xkv.server --group-size 0 --compression 2\n", "2 is refused"),
        ("    python -m scripts.soak_server --no-such-flag\n", "is refused"),
        ("    python -m scripts.support_table now\n", "takes no flags"),
        ("    python -m xkv.generate --compression 1\n", "exit code 2"),
        ("    python -m xkv.plan --memory much && true\n", "exit code 2"),
        ("    A=1 bash scripts/check_gpu.bash OUT\n", "no such file"),
    ],
)
def test_broken_command_fails(text, message, place, monkeypatch):
    page = place / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        check_commands(page, monkeypatch)
