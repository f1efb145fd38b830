"""Compile what each Triton kernel launches for Hopper, which needs no GPU; run as a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import xkv
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.ops.packed import Packed, Part, group_size_of
from xkv.ops.types import Landmarks, RopeRun


def packed_latent(array: Callable[..., torch.Tensor]) -> Packed:
    """A latent of parts whose numbers are plain, cut by words, and not cut."""
    parts = [Part((array(1, 4096, 64),), 16, 0)]
    for width, bits in ((64, 6), (96, 4)):
        group_size = group_size_of(width)
        words = array(1, 4096, width * bits // 32, dtype=torch.int32)
        scales = [array(1, 4096, width // group_size)] * 2
        parts.append(Part((words, *scales), bits, group_size))
    return Packed(tuple(parts), 2)


def main() -> None:
    """Print each kernel's shared memory in bytes; the arrays have no memory."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kinds = {
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.uint8: "u8",
        torch.int32: "i32",
        torch.int64: "i64",
    }

    def kind(value: Any, path: tuple[int, ...], hints: dict[tuple[int, ...], Any]) -> Any:
        """Triton's name for an argument's type; what divides it goes into ``hints``."""
        if isinstance(value, tuple):
            return tuple(kind(x, (*path, i), hints) for i, x in enumerate(value))
        is_array = isinstance(value, torch.Tensor)
        if is_array or value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        if is_array:
            return "*" + kinds[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in self.arg_names if name in options}
        signature, constants, hints = {}, {}, {}
        for parameter in self.params:
            value = values[parameter.name]
            if parameter.is_constexpr:
                constants[(parameter.num,)] = value
                signature[parameter.name] = "constexpr"
                continue
            signature[parameter.name] = kind(value, (parameter.num,), hints)
        source = ASTSource(self, signature, constants, hints)
        compiled = compile_source(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(self.__name__, compiled.metadata.shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        meta = torch.device("meta")

        def array(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=meta)

        spec = xkv.RopeSpec.standard(128, 10_000.0)
        segment = xkv.ops.types.Segment(
            array(1, 4096, 384),
            array(1, 4096, 576),
            array(1, 384, 8, 128),
            array(1, 576, 8, 128),
            4,
            (RopeRun(4096, spec),),
        )
        dense = array(1, 8, 256, 128), array(1, 8, 256, 128)
        queries, chunks = array(1, 32, 1, 128), array(1, 8, 16, dtype=torch.int64)
        packed = array(1, 8, 512, 32, dtype=torch.int32), *[array(1, 8, 512, 2)] * 2
        landmarks = Landmarks(packed, 8, 64, array(1, 8, 512, dtype=torch.bool), 8)
        launches = {
            "reconstruct_rows": (segment, array(1, 8, 128, dtype=torch.int64)),
            "selected_attention": (queries, segment, chunks, 8, *dense, 0.1),
            "lowrank_attention": (queries, segment, *dense, 0.1),
            "chunk_scores": (queries, landmarks, 0.1),
        }
        for name, args in launches.items():
            triton_kernels.TritonKernel(name)(*args)
        in_parts = segment._replace(latent_k=packed_latent(array), latent_v=packed_latent(array))
        counted = in_parts._replace(n_dense=array(1, dtype=torch.int64))
        for name in ("reconstruct_rows", "selected_attention", "lowrank_attention"):
            for other in (in_parts, counted):
                args = (other if x is segment else x for x in launches[name])
                triton_kernels.TritonKernel(name)(*args)


if __name__ == "__main__":
    main()
