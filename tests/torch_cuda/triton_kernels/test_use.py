"""When kernels run, what they refuse, and that they compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xkv
from tests.cache_decoding import decode_with_cache
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    WITHOUT_LATENT,
    arguments,
    mapped,
    needs_triton,
)
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.checks.decode_cases import CASES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.sequences import Latents
from xkv.ops.types import RopeRun

pytestmark = needs_triton


@pytest.mark.parametrize("size", [{"rank_k": 40, "rank_v": 56}, {"compression": 2}], ids=str)
def test_cache_decodes_on_kernels(backend: Backend, size: dict[str, Any]) -> None:
    config = xkv.XKVConfig(**size, sinks=2, window=20, budget=64)
    plain = xkv.load_backend("torch", device=str(backend.device), kernels="off")
    backend.kernels.last_path.clear()
    got = decode_with_cache(backend, config)
    assert backend.kernels.last_path == {name: name for name in OPERATIONS}
    assert relative_error(got, decode_with_cache(plain, config)) <= TOLERANCE["float32"]


def refusals(backend: Backend) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments that a kernel refuses, by a part of the sentence that says why."""

    def args_of(operation: str, case: DecodeCase = CASES[0]) -> tuple[Any, ...]:
        return arguments(backend, operation, make_inputs(backend, case, "float32"))

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.double() if x.is_floating_point() else x

    stored, rows, asked = args_of("key_scores")
    spec = stored.rope_runs[0].spec
    two_runs = stored._replace(rope_runs=(RopeRun(10, spec), RopeRun(54, None)))
    absorbed, latent, offsets, n_kv_heads = args_of("index_scores")
    values, _, scores, totals, beside = args_of("weigh_rows")
    queries, index, terms_spec = args_of("query_terms")
    scaled, dense, _ = args_of("attend_dense")
    two, two_rows, _ = args_of("attend_dense", DecodeCase(70, 2, 1, 64, 8, 8, n_queries=2))
    unused = two_rows._replace(n_used=torch.tensor([3], device=two.device))
    several = Latents((latent, latent))
    off = backend.xp.concat([stored.basis] * 2, axis=-1)[..., 8:72]
    return {
        "key_scores cannot run: the rows have 2": ("key_scores", (two_runs, rows, asked)),
        "head_dim=80 is not one of 32, 64": (
            "key_scores",
            args_of("key_scores", DecodeCase(16, 1, 1, 80, 8, 8, n_recent=0)),
        ),
        "10 pairs are rotated": (
            "key_scores",
            args_of("key_scores", DecodeCase(16, 1, 1, 64, 8, 8, rope_dims=20, n_recent=0)),
        ),
        "index_scores cannot run: Triton kernels take the latent of one batch": (
            "index_scores",
            (absorbed, several, offsets, n_kv_heads),
        ),
        "attend_dense cannot run: Triton kernels take the rows of one batch": (
            "attend_dense",
            (scaled, [dense, dense], None),
        ),
        "basis is strided": ("key_scores", (stored._replace(basis=off), rows, asked)),
        "columns are strided": (
            "key_scores",
            (stored._replace(latent=stored.latent.map(strided)), rows, asked),
        ),
        "key_scores cannot run: Triton kernels take .* not torch.float64": (
            "key_scores",
            mapped((stored, rows, asked), doubled),
        ),
        "queries are torch.float64": ("key_scores", (stored, rows, asked.double())),
        "weigh_rows cannot run: Triton kernels take .* not torch.float64": (
            "weigh_rows",
            (values, rows, scores, totals, beside.double()),
        ),
        "weigh_rows cannot run: the latent is torch.float64": (
            "weigh_rows",
            (values.map(doubled), rows, scores, totals, beside),
        ),
        "scores are torch.float16": (
            "weigh_rows",
            (values, rows, scores.half(), totals, beside),
        ),
        "totals are torch.float64": (
            "weigh_rows",
            (values, rows, scores, totals.double(), beside),
        ),
        "query_terms cannot run: Triton kernels take .* not torch.float64": (
            "query_terms",
            (queries.double(), index, terms_spec),
        ),
        "query_terms cannot run: the basis is torch.float64": (
            "query_terms",
            (queries, index.double(), terms_spec),
        ),
        "query_terms cannot run: the basis is strided": (
            "query_terms",
            (queries, strided(index), terms_spec),
        ),
        "the values are torch.float64": (
            "attend_dense",
            (scaled, dense._replace(values=dense.values.double()), None),
        ),
        "the keys are strided": (
            "attend_dense",
            (scaled, dense._replace(keys=strided(dense.keys)), None),
        ),
        "several queries of rows that are not all in use": ("attend_dense", (two, unused, None)),
        "the latent is torch.float64": (
            "index_scores",
            (absorbed, latent.map(doubled), offsets, n_kv_heads),
        ),
        "offsets are torch.float64": (
            "index_scores",
            (absorbed, latent, offsets.double(), n_kv_heads),
        ),
    }


def test_kernel_refuses_in_a_sentence(backend: Backend) -> None:
    cases = refusals(xkv.load_backend("torch", device=str(backend.device), kernels="off"))
    for reason, (operation, args) in cases.items():
        with pytest.raises(xkv.InputError, match=reason):
            getattr(backend, operation)(*args)


def test_other_bits_are_the_same_compilation(backend: Backend) -> None:
    for operation in OPERATIONS:
        kernel = triton_kernels.TritonKernel(operation)
        keys = set()
        for bits in ((4,), (6, 2, 2), (8, 6, 5, 4, 3, 2)):
            case = DecodeCase(70, 4, 2, 64, bits=bits, n_recent=0)
            args = arguments(backend, operation, make_inputs(backend, case, "float16"))
            keys.add(kernel.check_key(*args))
        case = replace(CASES[0], n_recent=0)
        plain = arguments(backend, operation, make_inputs(backend, case, "float16"))
        assert len(keys) == 1
        assert (kernel.check_key(*plain) in keys) == (operation in WITHOUT_LATENT)


def test_cpu_tells_once_and_stays_plain(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caplog.set_level(logging.INFO, "xkv")
    plain = xkv.load_backend("torch", device="cpu")
    inputs = make_inputs(plain, CASES[0], "float32")
    for operation in OPERATIONS:
        getattr(plain, operation)(*arguments(plain, operation, inputs))
        assert plain.kernels.last_path[operation] == "plain"
    told = [x for x in caplog.records if "plain operations" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.INFO]
    strict = xkv.load_backend("torch", device="cpu", kernels="on")
    with pytest.raises(xkv.InputError, match="need a CUDA device"):
        strict.key_scores(*arguments(plain, "key_scores", inputs))


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler does not; the compiler needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parents[3]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    compiled = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_all.py"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    names, sizes, shared_by = zip(*map(str.split, compiled.stdout.splitlines()), strict=True)
    # one for packed latents, whatever their bits, and two for others; rotated or not
    of_dtype = dict.fromkeys(("index_scores_kernel", "weigh_rows_kernel"), (2, 1, 1))
    of_dtype["key_scores_kernel"] = 4, 2, 2
    of_dtype["query_terms_kernel"] = (4,)
    # whether there are rows that are not in use, and sinks
    of_dtype["attend_parts_kernel"] = of_dtype["add_parts_kernel"] = 2, 1
    for name, counts in of_dtype.items():
        found = [int(n) for x, n in zip(names, shared_by, strict=True) if x == name]
        assert sorted(found[: 2 * len(counts)]) == sorted(2 * counts), compiled.stdout
    # what a program of compute capability 8.6, which has the least, may use
    assert max(map(int, sizes)) <= 99 * 1024
