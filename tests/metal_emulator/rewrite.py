"""What plain C++ cannot express: rules of MSL that g++ lets pass, and threadgroup variables."""

import re
from collections.abc import Iterator

from .errors import MetalKernelError

_FORBIDDEN = {
    r"\bdouble\b": "MSL has no double",
    r"\bstd\s*::": "MSL has no namespace std, use metal::",
    r"\b(?:new|delete|goto|throw|try|virtual|dynamic_cast|typeid|thread_local|asm)\b": "not in MSL",
    r"\[\s*[&=]\s*\]": "not every Metal version has lambdas",
    r"#\s*include\b(?!\s*<metal_)": "only <metal_...> can be included",
}
_SPACES = r"(?:device|constant|thread|threadgroup)"
_SCALARS = r"(?:float|half|bfloat|bool|char|short|int|long|uchar|ushort|uint|ulong|size_t)"
_TYPE = (
    rf"(?:(?:packed_)?{_SCALARS}[234]?|float16_t|bfloat16_t|u?int(?:8|16|32|64)_t|simdgroup_\w+8x8"
    r"|(?:vec|simdgroup_matrix|atomic)\s*<[^<>;]*>)"
)


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _mask(text: str) -> str:
    """Blank comments and strings, keeping every offset."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', _blank, text, flags=re.S)


def _blank_preprocessor(mask: str) -> str:
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", _blank, mask, flags=re.M)


def _refuse(label: str, text: str, offset: int, what: str, why: str) -> MetalKernelError:
    line = text.count("\n", 0, offset) + 1
    return MetalKernelError("compile", f"{label}:{line}: `{' '.join(what.split())}`: {why}")


def _declared_variables(mask: str) -> Iterator[tuple[re.Match[str], str]]:
    """The declarations of threadgroup variables, each with the text after the keyword."""
    for found in re.finditer(r"(?:^|(?<=[;{}]))\s*\bthreadgroup\b", mask):
        declaration = mask[found.end() : mask.find(";", found.end())]
        if not re.match(r"\s*(?:[\w:]+\s+)*[\w:]+(?:\s*<[^;]*?>)?\s*[*&]", declaration):
            yield found, declaration


def _check_program_scope(label: str, text: str, mask: str) -> None:
    outer, before = _blank_preprocessor(mask), ""
    while outer != before:
        outer, before = re.sub(r"\{[^{}]*\}", lambda m: _blank(m)[:-1] + ";", outer), outer
    for found in re.finditer(r"[^;]*?\b(?:const|constexpr)\b[^;(]*=", outer):
        if "(" not in found[0] and not re.search(r"\bconstant\b", found[0]):
            why = "a variable at program scope must be declared constant"
            raise _refuse(label, text, found.end(), found[0], why)


def check_rules(label: str, text: str, template_types: tuple[str, ...] = ()) -> None:
    """Refuse code that g++ accepts and Metal does not.

    Args:
        label: File name for messages.
        template_types: Names of the type parameters of the kernel.

    Raises:
        MetalKernelError: Of kind "compile", with the line.
    """
    mask = _mask(text)
    for pattern, why in _FORBIDDEN.items():
        found = re.search(pattern, mask)
        if found:
            raise _refuse(label, text, found.start(), found[0], why)
    names = "|".join(
        [_TYPE, *map(re.escape, template_types), *re.findall(r"\b(?:typename|class)\s+(\w+)", mask)]
    )
    # A type before * or & always makes a pointer or reference, and those need an address space.
    for found in re.finditer(rf"((?:[\w]+\s+)*)\b(?:{names})\s*(?:const\s*)?[*&](?![&=])", mask):
        if not re.search(rf"\b{_SPACES}\b", found[1]):
            why = "a pointer or reference needs an address space (device, constant, ...)"
            raise _refuse(label, text, found.start(), found[0], why)


def check_header(label: str, text: str) -> None:
    """Refuse what MSL does not allow outside the kernel's body.

    Raises:
        MetalKernelError: Of kind "compile", with the line.
    """
    check_rules(label, text)
    mask = _mask(text)
    _check_program_scope(label, text, mask)
    for found, declaration in _declared_variables(_blank_preprocessor(mask)):
        why = "threadgroup variables are declared in the kernel's body"
        raise _refuse(label, text, found.end(), declaration, why)


def place_threadgroup_variables(label: str, text: str) -> str:
    """Turn declarations of threadgroup variables into references to the runtime's memory.

    Raises:
        MetalKernelError: Of kind "compile", for a declaration that is not plain.
    """
    pieces, position, count = [], 0, 0
    for found, declaration in _declared_variables(_blank_preprocessor(_mask(text))):
        if re.search(r"[=*&]", re.sub(r"\[[^\]]*\]", "", declaration)):
            why = "a threadgroup variable takes no initialiser, and no pointer beside it"
            raise _refuse(label, text, found.end(), declaration, why)
        parts = re.match(
            r"\s*((?:[\w:]+\s+)*?[\w:]+(?:\s*<[^;]*?>)?)\s+(\w+\s*(?:\[[^;]*)?(?:,.*)?)$",
            declaration,
            re.S,
        )
        if not parts:
            raise _refuse(
                label, text, found.end(), declaration, "not read as a threadgroup variable"
            )
        pieces.append(text[position : found.end() - len("threadgroup")])
        for variable in re.split(r",(?![^\[]*\])", parts[2]):
            name = re.findall(r"\w+", variable)[0]
            extent = variable.strip().removeprefix(name)
            declared = f'emu::threadgroup_variable<{parts[1]} {extent}>({count}, "{name}")'
            pieces.append(f"auto& {name} = {declared}; ")
            count += 1
        position = found.end() + len(declaration) + 1
    return "".join(pieces) + text[position:]
