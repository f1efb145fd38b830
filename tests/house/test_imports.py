"""The order of the rooms: imports point one way, and no two modules need each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    ("xkv.errors",),
    ("xkv.config", "xkv.tiny"),
    ("xkv.ops",),
    ("xkv.store",),
    ("xkv.cache",),
    ("xkv.planning",),
    ("xkv.cli",),
    ("xkv.checks",),
    ("xkv.evaluation",),
)
"""Each room may import those above it, and itself."""
FACE = ("xkv", "xkv.caches", "xkv.__main__")
"""What a program imports, and what finds a command: above every room."""
LARGEST = 300
"""Lines of a file, kernels excepted."""


def source_files() -> dict[str, Path]:
    """Files of the package by the name of their module."""
    found = {}
    for folder, package in (("xkv", "xkv"), ("backends", "xkv.backends")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


FILES = source_files()
COMMANDS = {
    name
    for name in FILES
    if name.count(".") == 1 and name not in FACE and not FILES[name].name.startswith("__init__")
} - {"xkv.errors", "xkv.config"}


def imported_by(source: str, known: set[str] | dict[str, Path]) -> set[str]:
    """Modules of ours that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if name in known}
            # names of the package itself come from its __init__
            found |= modules if len(modules) == len(inside) else modules | {node.module}
    return found


IMPORTS = {name: imported_by(path.read_text(), FILES) - {name} for name, path in FILES.items()}


def rank(module: str) -> int:
    """The height of a module's room; commands and the face are above all, backends beside them."""
    for height, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    assert module in COMMANDS or module in FACE or module.startswith("xkv.backends"), module
    return len(ROOMS)


def arrows_up(imports: dict[str, set[str]]) -> list[str]:
    """Imports from a room by one below it."""
    return [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if not name.startswith("xkv.backends") and rank(other) > rank(name)
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that need each other, in a row; none if there are none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(imports) if (found := walk(name, []))), [])


def test_imports_point_one_way():
    assert arrows_up(IMPORTS) == []


def test_no_two_modules_need_each_other():
    assert circle(IMPORTS) == []


def test_only_the_face_and_commands_look_at_commands():
    found = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others & COMMANDS
        if name != "xkv.__main__"
    ]
    assert found == []


def test_backends_look_at_no_evaluation_and_nothing_looks_at_a_backend():
    backends = [name for name in IMPORTS if name.startswith("xkv.backends")]
    looks = {other for name in backends for other in IMPORTS[name]}
    assert not [name for name in looks if name.startswith(("xkv.evaluation", "xkv.checks"))]
    others = {
        name: [x for x in IMPORTS[name] if x.startswith("xkv.backends")]
        for name in IMPORTS
        if not name.startswith("xkv.backends")
    }
    assert not {name: found for name, found in others.items() if found}
    mlx = {x for name in backends if ".mlx_metal" in name for x in IMPORTS[name]}
    assert not [name for name in mlx if ".torch_cuda" in name]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("xkv", ("mlx", "torch", "transformers", "xkv.backends", "xkv.evaluation")),
        ("xkv.backends.mlx_metal", ("xkv.evaluation", "xkv.checks")),
        ("xkv.backends.torch_cuda", ("mlx", "transformers", "xkv.evaluation", "xkv.checks")),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, absent):
    program = f"import sys, {module}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = run.stdout.split()
    assert module in loaded, run.stderr
    found = [x for x in loaded if any(x == name or x.startswith(f"{name}.") for name in absent)]
    assert not found


@pytest.mark.parametrize("folder", ["xkv", "backends", "tests", "scripts"])
def test_files_are_short(folder):
    lines = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
        if "kernels" not in path.parts
    }
    assert lines
    assert not {str(path): count for path, count in lines.items() if count > LARGEST}


def test_an_arrow_that_runs_back_and_a_circle_are_found():
    planted = IMPORTS | {"xkv.ops.rope": {"xkv.store.codec"}}
    assert arrows_up(planted) == ["xkv.ops.rope imports xkv.store.codec"]
    assert circle(planted)[0] == circle(planted)[-1]
    assert imported_by("def f():\n    from xkv.store import codec, svd\n", FILES) == {
        "xkv.store.codec",
        "xkv.store.svd",
    }
