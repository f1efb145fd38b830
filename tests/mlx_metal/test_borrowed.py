"""What is taken of mlx-lm and mlx-vlm is in the table, and a change is told in a sentence."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import xkv.backends
from xkv.backends.mlx_metal.cli.chat import CachePrompt, Chat
from xkv.backends.mlx_metal.cli.generate import Generate
from xkv.backends.mlx_metal.model import borrowed, plan
from xkv.backends.mlx_metal.server.command import Server
from xkv.errors import InputError

INSTALLED = {
    name: entries
    for name, entries in borrowed.TAKEN.items()
    if importlib.util.find_spec(name.partition(".")[0])
}
"""mlx-vlm's only where somebody brought it."""
ENTRIES = [(name, path) for name, entries in INSTALLED.items() for path in entries]
KNOWN = {
    "mlx-lm": "0.31.3 and 0.32.2 are known to work: pip install 'mlx-lm==0.32.2'",
    "mlx-vlm": "0.7.10 is known to work: pip install 'mlx-vlm==0.7.10'",
}
IDS = [f"{name}.{path}" for name, path in ENTRIES]


@pytest.fixture
def checked(monkeypatch):
    """Checks one entry alone, of an mlx-lm that is newer than all."""
    monkeypatch.setattr(borrowed, "version", lambda package: "9.0")

    def check(name, path):
        monkeypatch.setattr(borrowed, "TAKEN", {name: {path: borrowed.TAKEN[name][path]}})
        return borrowed.module.__wrapped__(name)

    return check


def put(monkeypatch, name, path, value):
    """Give a module something else by a dotted name."""
    owner = importlib.import_module(name)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, last, value)


def test_what_is_installed_has_all_of_it():
    for name in INSTALLED:
        borrowed.module.__wrapped__(name)


@pytest.mark.parametrize(("name", "path"), ENTRIES, ids=IDS)
def test_what_is_gone_is_named(name, path, checked, monkeypatch):
    outer, _, _ = path.rpartition(".")
    if outer:
        put(monkeypatch, name, outer, type("Emptied", (), {}))
    else:
        monkeypatch.delattr(importlib.import_module(name), path)
    with pytest.raises(InputError) as raised:
        checked(name, path)
    package = name.partition(".")[0].replace("_", "-")
    assert str(raised.value) == (
        f"{package} 9.0 has moved or changed {name}.{path}, which xkv builds on; {KNOWN[package]}"
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name, path in ENTRIES if borrowed.TAKEN[name][path]],
    ids=[x for x, (name, path) in zip(IDS, ENTRIES, strict=True) if borrowed.TAKEN[name][path]],
)
def test_what_is_called_otherwise_is_named(name, path, checked, monkeypatch):
    put(monkeypatch, name, path, lambda *, new: None)
    with pytest.raises(InputError, match=f"changed {name}.{path},"):
        checked(name, path)


@pytest.mark.parametrize(
    ("function", "is_fine"),
    [
        (lambda a, b, c: None, True),
        (lambda a, b, c, d=1: None, True),
        (lambda a, b, *args, **kwargs: None, True),
        (lambda b, a, c: None, False),
        (lambda a, b: None, False),
        (lambda a, d, b, c: None, False),
        (lambda a, b, c, d: None, False),
        (lambda a, b, c, *, d: None, False),
        (3, False),
    ],
)
def test_signatures_are_compared(function, is_fine, checked, monkeypatch):
    put(monkeypatch, "mlx_lm.utils", "_get_classes", function)
    monkeypatch.setitem(borrowed.TAKEN["mlx_lm.utils"], "_get_classes", "(a, b, *, c)")
    if is_fine:
        checked("mlx_lm.utils", "_get_classes")
        return
    with pytest.raises(InputError, match="_get_classes"):
        checked("mlx_lm.utils", "_get_classes")


def test_a_module_that_is_gone_is_named(checked, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.sample_utils", None)
    with pytest.raises(InputError, match=r"changed mlx_lm\.sample_utils, "):
        checked("mlx_lm.sample_utils", "make_sampler")


def test_a_command_says_it_without_a_traceback():
    program = (
        "import mlx_lm.models.cache as cache\n"
        "del cache.create_attention_mask\n"
        "from xkv import generate\n"
        "generate.main(['--max-tokens', '2'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert "create_attention_mask" in line


PACKAGES = ("mlx_lm", "mlx_vlm")


def modules_of(tree: ast.AST) -> dict[str, str]:
    """mlx-lm's modules by the names that a source gives them."""
    return {
        node.targets[0].id: node.value.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "borrowed.module"
        and isinstance(node.value.args[0], ast.Constant)
    }


def reached(node: ast.AST, modules: dict[str, str]) -> tuple[str, str] | None:
    """The module and the dotted name in it that an expression stands for."""
    if isinstance(node, ast.Attribute):
        base, rest = node.value, node.attr
        while isinstance(base, ast.Attribute):
            base, rest = base.value, f"{base.attr}.{rest}"
    else:
        base, rest = node, ""
    if isinstance(base, ast.Name) and base.id in modules:
        return modules[base.id], rest
    if isinstance(base, ast.Call) and ast.unparse(base.func) == "borrowed.module":
        argument = base.args[0]
        return (argument.value, rest) if isinstance(argument, ast.Constant) else None
    return None


def uses(source: str) -> set[tuple[str, str]]:
    """What a source takes of mlx-lm: by name, replaced by name, and overridden in a class."""
    tree = ast.parse(source)
    modules, found = modules_of(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found |= {(x, "imported") for x in names if x.partition(".")[0] in PACKAGES}
        elif isinstance(node, ast.Attribute) and (place := reached(node, modules)):
            found.add(place)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            place, name = reached(node.args[0], modules), node.args[1]
            # getattr with a default is for what some versions lack
            is_optional = ast.unparse(node.func) == "getattr"
            if place and isinstance(name, ast.Constant) and not is_optional:
                found.add((place[0], f"{place[1]}.{name.value}".lstrip(".")))
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if place := reached(base, modules):
                    found |= {(place[0], f"{place[1]}.{x}") for x in overridden(node, place)}
    return found


def overridden(node: ast.ClassDef, place: tuple[str, str]) -> set[str]:
    """Methods of mlx-lm's class that one of ours calls, or has its own of."""
    theirs = getattr(importlib.import_module(place[0]), place[1])
    own = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
    own |= {
        x.attr
        for x in ast.walk(node)
        if isinstance(x, ast.Attribute) and ast.unparse(x.value) == "super()"
    }
    return {x for x in own if inspect.isroutine(getattr(theirs, x, None)) and x[:2] != "__"}


def absent(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What is not in the table, nor begins a name there."""
    return {
        (name, path)
        for name, path in found
        if path and not any(f"{x}.".startswith(f"{path}.") for x in borrowed.TAKEN.get(name, ()))
    }


SOURCES = [x for room in (xkv, xkv.backends) for x in Path(room.__file__).parent.rglob("*.py")]


def test_everything_taken_is_in_the_table():
    found = set().union(*(uses(path.read_text()) for path in SOURCES))
    assert len(found) > 30
    assert absent(found) == set()


def test_what_commands_replace_is_in_the_table():
    commands = {"generate": Generate, "chat": Chat, "cache_prompt": CachePrompt, "server": Server}
    for name, command in commands.items():
        module = importlib.import_module(f"mlx_lm.{name}")
        replaced = set(command().replacements(module))
        # the server's classes are checked where they are subclassed
        names = {path.partition(".")[0] for path in borrowed.TAKEN[f"mlx_lm.{name}"]}
        assert replaced <= names


@pytest.mark.parametrize(
    "source",
    [
        "import mlx_lm.server",
        "import mlx_vlm",
        "def f():\n    from mlx_lm.models import cache",
        "x = borrowed.module('mlx_lm.utils')\nx.save_model()",
        "borrowed.module('mlx_lm.utils').save_model()",
        "x = borrowed.module('mlx_lm.utils')\nPatch(x, 'save_model', f)",
        "x = borrowed.module('mlx_lm.generate')\nPatch(x.BatchGenerator, 'prompt_step', f)",
        "x = borrowed.module('mlx_lm.server')\nclass A(x.APIHandler):\n    def do_OPTIONS(self): 0",
        "x = borrowed.module('mlx_lm.server')\nclass A(x.APIHandler):\n"
        "    def f(self): super().do_OPTIONS()",
        "x = borrowed.module('mlx_lm.convert')\nx.convert()",
    ],
)
def test_what_is_not_in_the_table_is_found(source):
    assert absent(uses(source))


def test_what_older_versions_lack_is_done_without(monkeypatch):
    packed = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    name = "_compressed_tensors_quantization"
    monkeypatch.setattr(plan.utils, name, lambda found: {"format": found["format"]}, raising=False)
    assert plan._foreign_quantization(packed) == {"format": packed["format"]}
    monkeypatch.delattr(plan.utils, name)
    assert plan._foreign_quantization(packed) == {"group_size": 32, "bits": 4}
