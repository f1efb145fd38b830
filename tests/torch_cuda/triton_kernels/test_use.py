"""When kernels run, what they refuse, and that they compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xkv
from tests.cache_decoding import decode_with_cache
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    make_scores_case,
    needs_triton,
)
from xkv.checks.decode_cases import CASES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.types import RopeRun

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("attention", "operations"),
    [
        ("dense", {"lowrank_attention"}),
        ("selective", {"chunk_scores", "selected_attention"}),
    ],
)
def test_cache_decodes_on_kernels(backend: Backend, attention: str, operations: set[str]) -> None:
    config = xkv.XKVConfig(
        rank_k=40, rank_v=56, sinks=2, window=20, attention=attention, budget=64, outlier_chunks=3
    )
    plain = xkv.load_backend("torch", device=str(backend.device), kernels="off")
    backend.kernels.last_path.clear()
    got = decode_with_cache(backend, config)
    assert backend.kernels.last_path == {name: name for name in operations}
    assert relative_error(got, decode_with_cache(plain, config)) <= TOLERANCE["float32"]


def refusals(backend: Backend) -> dict[str, tuple[str, tuple]]:
    """Arguments that a kernel refuses, by a part of the sentence that says why."""
    inputs = make_inputs(backend, CASES[0], "float32")
    args = arguments("selected_attention", inputs)
    run = inputs.segment.rope_runs[0]
    segment = inputs.segment._replace(rope_runs=(RopeRun(10, run.spec), RopeRun(54, None)))
    narrow = make_inputs(backend, DecodeCase(16, 1, 1, 80, 8, 8, n_selected_chunks=1), "float32")
    strided = inputs.segment.latent_k.repeat_interleave(2, dim=-1)[..., ::2]
    scores = make_scores_case(backend, "float32", 40)
    lowrank = arguments("lowrank_attention", inputs)
    mask = torch.ones(1, 85, dtype=torch.bool, device=backend.device)
    two = (inputs.queries.repeat(1, 1, 2, 1), *args[1:])
    return {
        "no mask": ("lowrank_attention", (*lowrank, mask)),
        "2 rotary embeddings": ("selected_attention", (args[0], segment, *args[2:])),
        "head_dim=80": ("selected_attention", arguments("selected_attention", narrow)),
        "one query": ("selected_attention", two),
        "one query a head": ("chunk_scores", (scores[0].repeat(1, 1, 2, 1), *scores[1:])),
        "differ in dtype": ("selected_attention", (args[0].half(), *args[1:])),
        "strided": (
            "selected_attention",
            (args[0], inputs.segment._replace(latent_k=strided), *args[2:]),
        ),
        "float64": ("lowrank_attention", (lowrank[0].double(), *lowrank[1:])),
        "65 query heads": (
            "selected_attention",
            (args[0].repeat(1, 65, 1, 1), *args[1:]),
        ),
    }


def test_kernel_refuses_in_a_sentence(backend: Backend) -> None:
    for reason, (operation, args) in refusals(backend).items():
        with pytest.raises(xkv.InputError, match=reason):
            getattr(backend, operation)(*args)


def test_cpu_tells_once_and_stays_plain(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caplog.set_level(logging.INFO, "xkv")
    plain = xkv.load_backend("torch", device="cpu")
    inputs = make_inputs(plain, CASES[0], "float32")
    for operation in OPERATIONS:
        getattr(plain, operation)(*arguments(operation, inputs))
        assert plain.kernels.last_path[operation] == "plain"
    told = [x for x in caplog.records if "plain operations" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.INFO]
    strict = xkv.load_backend("torch", device="cpu", kernels="on")
    with pytest.raises(xkv.InputError, match="need a CUDA device"):
        strict.reconstruct_rows(*arguments("reconstruct_rows", inputs))


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
    names, sizes = zip(*map(str.split, compiled.stdout.splitlines()), strict=True)
    assert len(set(names)) == 7, compiled.stdout
    # what a program of compute capability 8.6, which has the least, may use
    assert max(map(int, sizes)) <= 99 * 1024
