"""The text that MLX builds around the body of a custom kernel, byte for byte.

Source: mlx/backend/common/metal_kernel.cpp of MLX 0.32; the tests compare with the installed MLX.
"""

from collections.abc import Sequence
from dataclasses import dataclass

METAL_TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "bool": "bool",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def _uint3(value: str) -> str:
    return f"uint3({value}.x, {value}.y, {value}.z)"


def _threads(size: str) -> str:
    return f"({size}.x * {size}.y * {size}.z)"


_SIZE, _LIMIT = "emu::grid.threadgroup_size", "emu::grid.threadgroup_limit"
# Attribute: (MSL type, its value in the emulator), in the order in which MLX adds them.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", f"({_threads(_LIMIT)} + 3) / 4"),
    "dispatch_simdgroups_per_threadgroup": ("uint", f"({_threads(_LIMIT)} + 31) / 32"),
    "dispatch_threads_per_threadgroup": ("uint3", _uint3(_LIMIT)),
    "grid_origin": ("uint3", "uint3(0)"),
    "grid_size": ("uint3", _uint3("emu::grid.threads")),
    "quadgroup_index_in_threadgroup": ("uint", "emu::current->index / 4"),
    "quadgroups_per_threadgroup": ("uint", f"({_threads(_SIZE)} + 3) / 4"),
    "simdgroup_index_in_threadgroup": ("uint", "emu::current->simdgroup->index"),
    "simdgroups_per_threadgroup": ("uint", f"({_threads(_SIZE)} + 31) / 32"),
    "thread_execution_width": ("uint", "32u"),
    "thread_index_in_quadgroup": ("uint", "emu::current->index % 4"),
    "thread_index_in_simdgroup": ("uint", "emu::current->lane"),
    "thread_index_in_threadgroup": ("uint", "emu::current->index"),
    "thread_position_in_grid": ("uint3", _uint3("emu::current->position_in_grid")),
    "thread_position_in_threadgroup": ("uint3", _uint3("emu::current->position_in_threadgroup")),
    "threadgroup_position_in_grid": ("uint3", _uint3("emu::grid.threadgroup_position")),
    "threadgroups_per_grid": ("uint3", _uint3("emu::grid.threadgroups")),
    "threads_per_grid": ("uint3", _uint3("emu::grid.threads")),
    "threads_per_simdgroup": ("uint", "32u"),
    "threads_per_threadgroup": ("uint3", _uint3(_SIZE)),
}


@dataclass(frozen=True)
class BufferArgument:
    """One buffer of the signature: `part` is "data", "shape", "strides", "ndim" or "output"."""

    array: str
    part: str
    type: str
    is_reference: bool = False


@dataclass(frozen=True)
class KernelText:
    """What MLX hands to the Metal compiler after its preamble, in pieces."""

    function: str
    call: str  # the function with its template arguments
    header: str
    opening: str
    source: str
    instantiation: str
    arguments: tuple[BufferArgument, ...]
    attributes: tuple[str, ...]
    template_types: tuple[str, ...]
    is_broken: bool  # MLX closed the parameter list twice

    @property
    def text(self) -> str:
        return f"{self.header}{self.opening}{self.source}\n}}\n{self.instantiation}"


def _template_value(value: bool | int | str) -> str:
    return str(int(value)) if isinstance(value, (bool, int)) else METAL_TYPES[value]


def _template_kind(value: bool | int | str) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"


def build_text(
    name: str,
    source: str,
    header: str,
    inputs: Sequence[tuple[str, str, tuple[int, ...]]],
    outputs: Sequence[tuple[str, str]],
    template: Sequence[tuple[str, bool | int | str]],
    atomic_outputs: bool,
) -> KernelText:
    """Build the signature as MLX does.

    Args:
        inputs: (name, dtype name, shape) of each.
        outputs: (name, dtype name) of each.
        template: (name, value), a dtype by its name.
    """
    attributes = tuple(a for a in ATTRIBUTES if a in source)
    function = f"custom_kernel_{name}"
    values = [_template_value(value) for _, value in template]
    if values:
        function += ("__" + "_".join(values)).replace("-", "_")

    lines: list[str] = []
    arguments: list[BufferArgument] = []
    for array, dtype, shape in inputs:
        size = 1
        for n in shape:
            size *= n
        is_scalar, is_small = not shape, size < 8
        metal_type = METAL_TYPES[dtype]
        function += f"_{metal_type}" + ("s" if is_scalar else "c" if is_small else "")
        space, sign = ("constant" if is_small else "device"), ("&" if is_scalar else "*")
        lines.append(f"const {space} {metal_type}{sign} {array}")
        arguments.append(BufferArgument(array, "data", f"const {metal_type}", is_scalar))
        for part, part_type, part_sign in (
            ("shape", "int", "*"),
            ("strides", "int64_t", "*"),
            ("ndim", "int", "&"),
        ):
            if f"{array}_{part}" in source and not is_scalar:
                lines.append(f"const constant {part_type}{part_sign} {array}_{part}")
                arguments.append(
                    BufferArgument(array, part, f"const {part_type}", part_sign == "&")
                )
    for array, dtype in outputs:
        metal_type = METAL_TYPES[dtype]
        function += f"_{metal_type}"
        element = f"atomic<{metal_type}>" if atomic_outputs else metal_type
        lines.append(f"device {element}* {array}")
        arguments.append(BufferArgument(array, "output", element))

    # MLX compares a count of arrays with an index of buffers, which shapes and strides advance too.
    last = len(inputs) + len(outputs) - 1
    first_output = len(lines) - len(outputs)
    ends = [
        ",\n" if i < first_output or i < last or attributes else ") {\n" for i in range(len(lines))
    ]
    opening = ""
    if template:
        opening += "template <" + ", ".join(f"{_template_kind(v)} {n}" for n, v in template) + ">\n"
    opening += f"[[kernel]] void {function}(\n"
    opening += "".join(
        f"  {line} [[buffer({i})]]{end}"
        for i, (line, end) in enumerate(zip(lines, ends, strict=True))
    )
    opening += ",\n".join(f"  {ATTRIBUTES[a][0]} {a} [[{a}]]" for a in attributes) + (
        ") {\n" if attributes else ""
    )

    call = function + (f"<{', '.join(values)}>" if values else "")
    instantiation = (
        f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({call}) {call};\n'
        if values
        else ""
    )
    return KernelText(
        function=function,
        call=call,
        header=header,
        opening=opening,
        source=source,
        instantiation=instantiation,
        arguments=tuple(arguments),
        attributes=attributes,
        template_types=tuple(n for n, v in template if _template_kind(v) == "typename"),
        is_broken=ends.count(") {\n") > 1,
    )
