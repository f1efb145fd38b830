"""mlx-lm's flags and ours: known from its source before it is imported, which takes seconds."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xkv.cli.flags import add_compression_flags, add_generate_flags, check_flags
from xkv.cli.server_flags import add_server_flags, check_server_flags


def parser_class(
    command: str, take: Callable[[argparse.Namespace], None]
) -> type[argparse.ArgumentParser]:
    """An ``ArgumentParser`` for one of mlx-lm's commands, with our flags too.

    Args:
        command: "generate", "chat", "server" or "cache_prompt".
        take: Called with what was parsed.
    """

    class Parser(argparse.ArgumentParser):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "prog": f"python -m xkv.{command}"})
            add_compression_flags(self)
            if command == "generate":
                add_generate_flags(self)
            if command == "server":
                add_server_flags(self)

        def add_argument(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kwargs.get("type"), types.FunctionType):
                kwargs["type"] = _refusing(kwargs["type"])
            return super().add_argument(*args, **kwargs)

        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            for action in self._actions:
                if action.dest == "model":
                    action.help = f"{action.help} (default: the model that comes with xkv)"
                    action.default = None
                if action.dest == "prompt" and not action.required:
                    action.help = f"{action.help} (default: a question about a long document)"
                    action.default = None
            parsed = super().parse_args(*args, **kwargs)
            if command == "server":
                check_server_flags(parsed)
            take(parsed)
            return parsed

    return Parser


def argparse_with(parser: type[argparse.ArgumentParser]) -> types.SimpleNamespace:
    """The module ``argparse`` with another parser."""
    return types.SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser})


def _refusing(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A flag's parser all of whose errors argparse takes for a wrong value."""

    @functools.wraps(parse)
    def refusing(text: str) -> Any:
        try:
            return parse(text)
        except (ArithmeticError, LookupError) as error:
            raise ValueError(str(error)) from error

    return refusing


class _Parsed(Exception):
    """Ends a command when its flags are parsed."""


def check_early(
    command: str, argv: Sequence[str] | None = None, *, writes_file: bool = False
) -> None:
    """Answer ``--help`` and refuse wrong flags before mlx-lm or a framework is imported.

    mlx-lm's ``main`` is run up to where it has parsed its flags. Where its source is not as it was,
    its own import finds the same mistakes, later.

    Args:
        command: Its name.
        argv: Arguments; None takes the program's.
        writes_file: As for :func:`xkv.cli.flags.check_flags`.

    Raises:
        InputError: If the flags contradict each other.
    """
    main = _main_of(command)
    if main is None:
        return

    def take(args: argparse.Namespace) -> NoReturn:
        check_flags(args, writes_file)
        raise _Parsed

    main.__globals__["argparse"] = argparse_with(parser_class(command, take))
    before = sys.argv
    sys.argv = [command, *(before[1:] if argv is None else argv)]
    try:
        with contextlib.suppress(_Parsed, NameError):
            main()
    finally:
        sys.argv = before


def _main_of(command: str) -> Any:
    """``main`` of an mlx-lm module; None if there is none."""
    package = importlib.util.find_spec("mlx_lm")
    if package is None or package.origin is None:
        return None
    return _names_of(Path(package.origin).with_name(f"{command}.py")).get("main")


def _names_of(path: Path) -> dict[str, Any]:
    """A module's constants and functions, those of its siblings too, and the standard library."""
    names: dict[str, Any] = {"__name__": f"mlx_lm.{path.stem}"}
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.level:
            sibling = path.with_name(f"{statement.module}.py")
            theirs = _names_of(sibling) if sibling.is_file() else {}
            wanted = {alias.name for alias in statement.names}
            names.update((name, theirs[name]) for name in wanted & set(theirs))
        elif _is_standard(statement) or isinstance(statement, ast.Assign | ast.FunctionDef):
            # what is annotated with, or made from, what was left out
            with contextlib.suppress(NameError):
                exec(compile(ast.Module([statement], []), str(path), "exec"), names)
    return names


def _is_standard(statement: ast.stmt) -> bool:
    """Whether it imports from the standard library."""
    if isinstance(statement, ast.ImportFrom):
        modules = [statement.module or ""]
    elif isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
    else:
        return False
    return all(module.partition(".")[0] in sys.stdlib_module_names for module in modules)
