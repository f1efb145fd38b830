"""The methods that are compared, one a file, and how a user names them."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation.methods.full import Full
from xkv.evaluation.methods.landmarks import Landmarks
from xkv.evaluation.methods.lloydmax import LloydMax
from xkv.evaluation.methods.lowrank import parse_options
from xkv.evaluation.methods.method import Compressed, Method
from xkv.evaluation.methods.minicache import MiniCache
from xkv.evaluation.methods.quantized import Quantized
from xkv.evaluation.methods.quest import Quest
from xkv.evaluation.methods.random_keys import RandomKeys
from xkv.evaluation.methods.rotating import Rotating
from xkv.evaluation.methods.snapkv import SnapKV, SnapKVQuery
from xkv.evaluation.methods.veloxquant import VeloxQuant
from xkv.planning.document import Document

__all__ = ["NAMES", "Compressed", "Document", "Method", "parse_method"]

_LOW_RANK = "xkv", "svd"
_OTHERS: dict[str, Any] = {
    kind.name: kind
    for kind in (
        *(Full, Quantized, LloydMax, Rotating, SnapKV, SnapKVQuery),
        *(Quest, Landmarks, MiniCache, VeloxQuant, RandomKeys),
    )
}

NAMES = (*_LOW_RANK, *_OTHERS)
"""What :func:`parse_method` knows."""


def parse_method(text: str) -> Method:
    """A method as a user writes it: ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

    Options are the fields of the method's class, for ``xkv`` those of :class:`xkv.XKVConfig`;
    ``svd`` is ``xkv`` with groups of one layer. The text itself is the method's label.

    Raises:
        InputError: If the name, an option or a value is not one of those that there are.
    """
    name, _, rest = text.partition(":")
    if name not in NAMES:
        raise InputError(f"method {name!r} is unknown; choose one of {', '.join(NAMES)}")
    options = _parse_options(text, rest)
    if name in _OTHERS:
        _check(name, _OTHERS[name], options)
        return _OTHERS[name](**options)
    if name == "svd":
        if "group_size" in options:
            raise InputError("svd has groups of one layer: leave group_size out, or name xkv")
        options["group_size"] = 1
    _check(name, XKVConfig, options)
    return parse_options(options, name)


def _check(name: str, kind: Any, options: dict[str, Any]) -> None:
    """Refuse options that a dataclass has no field for, and values of another type."""
    hints, known = get_type_hints(kind), {field.name: field.type for field in fields(kind)}
    for option, value in options.items():
        if option not in known:
            told = f"its options: {', '.join(known)}" if known else "it has none"
            raise InputError(f"{name} has no option {option!r}; {told}")
        if not _is_a(value, hints[option]):
            raise InputError(f"{name}: {option}={value} must be {known[option]}")


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _parse_options(text: str, rest: str) -> dict[str, Any]:
    """``OPTION=VALUE,...``"""
    options: dict[str, Any] = {}
    for piece in filter(None, rest.split(",")):
        option, is_given, value = piece.partition("=")
        if not is_given or option in options:
            raise InputError(f"{text!r} is not NAME:OPTION=VALUE,... with every option once")
        options[option] = _parse_value(value)
    return options


def _parse_value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
