"""Compile what each Triton kernel launches for Hopper, which needs no GPU; run as a script."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.config import BAND
from xkv.ops.latent import Latent
from xkv.ops.recent import Recent
from xkv.ops.scores import Dense
from xkv.ops.types import RopeRun, RopeSpec, Stored

DTYPES = (torch.bfloat16, torch.float32)
BITS = ((8, 6, 5, 4, 3, 2), (2,))


def array(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def latents(dtype: torch.dtype) -> list[Latent]:
    """Packed ones, and matrices with rows on and off multiples of 16 bytes."""
    found = [Latent((array(1, 4096, rank, dtype=dtype),)) for rank in (384, 37)]
    for bits in BITS:
        words = array(1, 4096, sum(bits) * BAND // 32, dtype=torch.int32)
        scales = [array(1, 4096, len(bits), dtype=dtype)] * 2
        found.append(Latent((words, *scales), bits))
    return found


def launches(dtype: torch.dtype, head_dim: int) -> list[tuple[triton_kernels.TritonKernel, Any]]:
    """Kernels and arguments: scores and sums of rows, the keys' index, and dense rows."""
    spec = RopeSpec.standard(head_dim, 10_000.0)
    runs = RopeRun(4096, spec), RopeRun(4096, None)
    offsets = array(1, 32, dtype=torch.float32)
    queries = array(1, 32, 1, head_dim, dtype=dtype)
    found: list[tuple[triton_kernels.TritonKernel, Any]] = []
    for latent in latents(dtype):
        basis = array(1, latent.rank, 8, head_dim, dtype=dtype)
        rows = array(1, 8, 384, dtype=torch.int64)
        for run in runs:
            stored = Stored(latent, basis, 4, (run,))
            found.append((triton_kernels.KEY_SCORES, (stored, rows, queries)))
        scores = array(1, 8, 4, 384, dtype=torch.float32)
        found.append((triton_kernels.WEIGH_ROWS, (latent, rows, scores, offsets, queries)))
        n_index = BAND + len(latent.bits) - 1 if latent.bits else min(BAND, latent.rank)
        absorbed = array(1, 16, n_index, 32, dtype=dtype)
        found.append((triton_kernels.INDEX_SCORES, (absorbed, latent, offsets, 8)))
        index = array(1, n_index, 8, head_dim, dtype=dtype)
        found.append((triton_kernels.QUERY_TERMS, (queries, index, spec)))
    for n_rows in (32768, 131072):
        worth = array(1, 8, n_rows, dtype=torch.float32)
        found.append((triton_kernels.CHOOSE_ROWS, (worth, 128)))
    rows = array(1, 8, 300, head_dim, dtype=dtype)
    numbers = array(1, 8, 512, 2 * head_dim, dtype=torch.int8)
    recent = Recent(numbers, array(1, 8, 512, 2, dtype=torch.float32))
    dense = Dense(rows, rows, None, recent)
    unused = dense._replace(n_used=array(1, dtype=torch.int64))
    sinks = array(32, dtype=dtype)
    for given in ((dense, None), (dense, sinks), (unused, None)):
        found.append((triton_kernels.ATTEND_DENSE, (queries, *given)))
    return found


def main() -> None:
    """Print each compilation's name and shared memory in bytes, and how many arguments share it."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    kinds = {
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.int32: "i32",
        torch.int64: "i64",
        torch.int8: "i8",
    }
    counts: dict[str, list[Any]] = {}

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in self.arg_names if name in options}
        signature, constants, hints = {}, {}, {}
        for parameter in self.params:
            value, name = values[parameter.name], parameter.name
            if parameter.is_constexpr or value is None:
                constants[(parameter.num,)], signature[name] = value, "constexpr"
                continue
            is_array = isinstance(value, torch.Tensor)
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if is_array:
                signature[name] = "*" + kinds[value.dtype]
            if not parameter.do_not_specialize and (is_array or value % 16 == 0):
                hints[(parameter.num,)] = [["tt.divisibility", 16]]
        key = f"{self.__name__} {signature} {constants} {hints}"
        if key not in counts:
            source = ASTSource(self, signature, constants, hints)
            compiled = compile_source(source, target=GPUTarget("cuda", 90, 32), options=options)
            counts[key] = [self.__name__, compiled.metadata.shared, 0]
        counts[key][-1] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        for dtype in DTYPES:
            for kernel, args in launches(dtype, 128):
                kernel(*args)
        for kernel, args in launches(torch.float32, 256)[:2]:
            kernel(*args)
    for count in counts.values():
        print(*count)


if __name__ == "__main__":
    main()
