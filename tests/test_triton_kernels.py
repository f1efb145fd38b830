"""The Triton kernels against the float64 reference: on a GPU, else through Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xkv
from tests.conftest import need_device
from xkv.attention import RopeRun
from xkv.backend import Backend
from xkv.backends.torch_cuda import kernels as triton_kernels
from xkv.decode_cases import CASES, CHUNK_SIZE, DTYPES, DecodeCase, DecodeInputs, make_inputs
from xkv.lowrank_cache import LowRankCache
from xkv.selection import Landmarks, make_landmarks
from xkv.tolerances import TOLERANCE, relative_error

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: pip install triton (Linux)")

if HAS_TRITON:
    import triton.language


def repair_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It multiplies bfloat16 as the integers that hold it, and cuts instead of rounding."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = triton.language
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter, "_convert_float", convert_float)


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Kernels that must run: on the GPU, or interpreted."""
    if torch.cuda.is_available():
        yield without_first_use_check("cuda")
        return
    if "cuda" in request.config.getoption("--require-backend"):
        need_device(request, "cuda", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        repair_interpreter(patch)
        yield without_first_use_check("cpu")


def without_first_use_check(device: str) -> Backend:
    """The check would take most of the time here; it has a test of its own."""
    backend = xkv.load_backend("torch", device=device, kernels="on")
    backend.kernels.check = lambda *args: None
    return backend


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        array = empty(*args, **options)
        return array.fill_(torch.nan) if array.is_floating_point() else array

    monkeypatch.setattr(torch, "empty", poisoned)


def arguments(operation: str, inputs: DecodeInputs, chunk_size: int = CHUNK_SIZE) -> tuple:
    """The inputs in the order of the backend's method."""
    x = inputs
    if operation == "reconstruct_rows":
        ids = torch.arange(chunk_size, device=x.chunks.device)
        return x.segment, (x.chunks[..., None] * chunk_size + ids).flatten(-2)
    if operation == "selected_attention":
        return x.queries, x.segment, x.chunks, chunk_size, x.keys, x.values, x.scale
    return x.queries, x.segment, x.keys, x.values, x.scale


def exact(args: Any, reference: Backend) -> Any:
    """The same numbers in float64 on the reference's device."""
    if isinstance(args, torch.Tensor):
        args = args.to(reference.device)
        return args.double() if args.is_floating_point() else args
    if isinstance(args, tuple):
        numbers = [exact(x, reference) for x in args]
        return type(args)(*numbers) if hasattr(args, "_fields") else tuple(numbers)
    return args


def check(backend: Backend, reference: Backend, operation: str, args: tuple) -> None:
    """Run the kernel, and compare with the reference on the same numbers."""
    backend.kernels.last_path.clear()
    got = getattr(backend, operation)(*args)
    assert backend.kernels.last_path[operation] == operation
    dtype = str(got.dtype).removeprefix("torch.")
    want = getattr(reference, operation)(*exact(args, reference))
    assert got.dtype == (args[0].latent_k if operation == "reconstruct_rows" else args[0]).dtype
    error = relative_error(backend.to_numpy(got), reference.to_numpy(want))
    assert error <= TOLERANCE[dtype]


OPERATIONS = ["reconstruct_rows", "selected_attention", "lowrank_attention"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_matches_reference(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase, dtype: str
) -> None:
    inputs = make_inputs(backend, case, dtype)
    check(backend, reference, operation, arguments(operation, inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_use_check_passes(backend: Backend, dtype: str) -> None:
    checked = xkv.load_backend("torch", device=str(backend.device), kernels="on")
    inputs = make_inputs(checked, CASES[3], dtype)
    for operation in OPERATIONS:
        getattr(checked, operation)(*arguments(operation, inputs))
    checked.chunk_scores(*make_scores_case(checked, dtype, 20))
    assert checked.kernels.last_path == {name: name for name in [*OPERATIONS, "chunk_scores"]}


@pytest.mark.parametrize("n", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_at_tile_edges(backend: Backend, reference: Backend, operation: str, n: int) -> None:
    n_rows = n if operation == "lowrank_attention" else 3 * n
    case = DecodeCase(8 * n_rows, 3, 1, 64, 32, n, n_dense=n, n_selected_chunks=n)
    inputs = make_inputs(backend, case, "float32")
    latents = [x[:, :n_rows] for x in inputs.segment[:2]]
    runs = (RopeRun(n_rows, inputs.segment.rope_runs[0].spec),)
    segment = inputs.segment._replace(latent_k=latents[0], latent_v=latents[1], rope_runs=runs)
    # chunks of one row, so that the number of selected rows is any number
    inputs = make_like(inputs, segment=segment, chunks=inputs.chunks % n_rows)
    check(backend, reference, operation, arguments(operation, inputs, chunk_size=1))


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 65])
def test_kernel_at_rank_edges(backend: Backend, reference: Backend, rank: int) -> None:
    inputs = make_inputs(backend, DecodeCase(24, 2, 1, 64, rank, 66 - rank), "float32")
    check(backend, reference, "selected_attention", arguments("selected_attention", inputs, 3))


def make_like(inputs: DecodeInputs, **changes: Any) -> DecodeInputs:
    return DecodeInputs(**{**vars(inputs), **changes})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_without_rope(backend: Backend, reference: Backend, operation: str) -> None:
    inputs = make_inputs(backend, CASES[1], "float32")
    segment = inputs.segment._replace(rope_runs=(RopeRun(CASES[1].n_rows, None),))
    check(backend, reference, operation, arguments(operation, make_like(inputs, segment=segment)))


@pytest.mark.parametrize("max_splits", [3, 64])
def test_lowrank_attention_over_many_blocks(
    backend: Backend, reference: Backend, max_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 12 blocks a split, and more splits than the merge takes at a time
    kernel = triton_kernels.LOWRANK_ATTENTION._kernel
    monkeypatch.setattr(sys.modules[kernel.__module__], "MAX_SPLITS", max_splits)
    inputs = make_inputs(backend, DecodeCase(34 * 64 + 1, 2, 1, 32, 16, 16), "float32")
    check(backend, reference, "lowrank_attention", arguments("lowrank_attention", inputs))


def test_selected_attention_over_many_blocks(backend: Backend, reference: Backend) -> None:
    case = DecodeCase(34 * 64, 2, 1, 32, 16, 16, n_dense=33 * 64, n_selected_chunks=33 * 8)
    inputs = make_inputs(backend, case, "float32")
    check(backend, reference, "selected_attention", arguments("selected_attention", inputs))


@pytest.mark.parametrize("operation", ["selected_attention", "lowrank_attention"])
@pytest.mark.parametrize("n_used", [1, 64, 70, 130])
def test_kernel_reads_the_rows_in_use(
    backend: Backend, reference: Backend, operation: str, n_used: int
) -> None:
    """Of 130 dense rows, three blocks: some of these are in use in part or not at all."""
    inputs = make_inputs(backend, CASES[4], "float32")
    counted = torch.tensor([n_used], device=backend.device)
    segment = inputs.segment._replace(n_dense=counted)
    unused = torch.arange(130, device=backend.device)[:, None] >= n_used
    keys, values = (torch.where(unused, 1e3, x) for x in (inputs.keys, inputs.values))
    args = arguments(operation, make_like(inputs, segment=segment, keys=keys, values=values))
    check(backend, reference, operation, args)
    plain = arguments(operation, make_like(inputs, keys=keys, values=values))
    cut = tuple(x[..., :n_used, :] if x is keys or x is values else x for x in plain)
    got, want = getattr(backend, operation)(*args), getattr(backend, operation)(*cut)
    assert relative_error(backend.to_numpy(got), backend.to_numpy(want)) < 1e-5


@pytest.mark.parametrize("start", [100_000, 1_000_000])
def test_reconstruct_rows_far_positions(backend: Backend, start: int) -> None:
    # float32 angles are coarse out here, and are part of the definition: the cosines are not
    inputs = make_inputs(backend, CASES[0], "float32")
    segment, rows = arguments("reconstruct_rows", inputs)
    got = backend.to_numpy(backend.reconstruct_rows(segment._replace(start=start), rows))
    half, ids = CASES[0].head_dim // 2, backend.to_numpy(rows)[0]
    inverse = np.float32(1) / np.array(segment.rope_runs[0].spec.freqs, np.float32)
    angles = (np.float32(start + ids)[..., None] * inverse).astype(np.float64)
    latent, basis = (backend.to_numpy(x)[0].astype(np.float64) for x in segment[0:3:2])
    keys = np.einsum("hsr,rhd->hsd", latent[ids], basis)
    x, y = keys[..., :half], keys[..., half:]
    turned = [x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)]
    assert relative_error(got[0], np.concatenate(turned, axis=-1)) <= 1e-6


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_reads_no_other_rows(backend: Backend, reference: Backend, operation: str) -> None:
    case = CASES[4]
    inputs = make_inputs(backend, case, "float16")
    want = getattr(reference, operation)(*exact(arguments(operation, inputs), reference))

    def in_buffer(x: torch.Tensor, axis: int) -> torch.Tensor:
        """The same numbers in an array that is longer and wider, and NaN elsewhere."""
        shape = [n + 40 * (i in (axis, x.ndim - 1)) for i, n in enumerate(x.shape)]
        buffer = x.new_full(shape, torch.nan)
        buffer = buffer[tuple(slice(n) for n in x.shape)]
        buffer.copy_(x)
        return buffer

    latents = [in_buffer(x, 1) for x in inputs.segment[:2]]
    if operation != "lowrank_attention":
        is_selected = torch.zeros(case.batch, case.n_rows, dtype=torch.bool)
        rows = arguments("reconstruct_rows", inputs)[1].cpu().flatten(1)
        is_selected.scatter_(1, rows, True)
        assert not is_selected.all()
        for latent in latents[: 1 if operation == "reconstruct_rows" else 2]:
            latent[~is_selected.to(latent.device)] = torch.nan
    bases = [in_buffer(x, 1) for x in inputs.segment[2:4]]
    segment = inputs.segment._replace(
        latent_k=latents[0], latent_v=latents[1], basis_k=bases[0], basis_v=bases[1]
    )
    poisoned = make_like(
        inputs,
        segment=segment,
        keys=in_buffer(inputs.keys, 2),
        values=in_buffer(inputs.values, 2),
    )
    got = getattr(backend, operation)(*arguments(operation, poisoned))
    error = relative_error(backend.to_numpy(got), reference.to_numpy(want))
    assert error <= TOLERANCE["float16"]


def make_scores_case(
    backend: Backend, dtype: str, n_chunks: int, head_dim: int = 64, bits: int = 8, sharing: int = 4
) -> tuple[torch.Tensor, Landmarks, float]:
    """Queries and landmarks of two KV heads and a batch of two; outliers in both."""
    kind = getattr(torch, dtype)
    queries = (backend.normal((2, 2 * sharing, 1, head_dim), 1) * 3).to(kind)
    keys = backend.normal((2, 2, 2 * n_chunks, head_dim), 2).to(kind)
    landmarks, _ = make_landmarks(backend, keys, 2, n_chunks // 20, bits)
    return queries, landmarks, head_dim**-0.5


def scores_error(got: torch.Tensor, args: tuple, reference: Backend) -> float:
    """Relative error apart from the outliers, which are marked exactly."""
    want = reference.chunk_scores(*exact(args, reference))
    is_outlier = args[1].is_outlier.cpu().numpy()
    scores, expected = got.cpu().numpy(), reference.to_numpy(want)
    assert got.dtype == torch.float32
    assert ((scores == -1) == is_outlier).all()
    return relative_error(scores[~is_outlier], expected[~is_outlier])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_chunks", "head_dim", "bits", "sharing"),
    [
        (1, 64, 8, 1),
        (63, 64, 8, 4),
        (64, 64, 4, 4),
        (65, 32, 8, 1),
        (65, 32, 4, 8),
        (129, 128, 8, 3),
        (33, 256, 16, 1),
        (1025, 64, 16, 2),
    ],
)
def test_chunk_scores_matches_reference(
    backend: Backend,
    reference: Backend,
    n_chunks: int,
    head_dim: int,
    bits: int,
    sharing: int,
    dtype: str,
) -> None:
    args = make_scores_case(backend, dtype, n_chunks, head_dim, bits, sharing)
    got = backend.chunk_scores(*args)
    assert backend.kernels.last_path["chunk_scores"] == "chunk_scores"
    # float32 from the products on, whatever the landmarks' dtype
    assert scores_error(got, args, reference) <= TOLERANCE["float32"]


def decode_with_cache(backend: Backend, config: xkv.XKVConfig) -> np.ndarray:
    """Two layers' attention of two tokens after a prompt."""
    cache = LowRankCache(backend, config, [[0, 1]])
    spec = xkv.RopeSpec.standard(64, 10_000.0)
    outputs = []
    for step, n_tokens in enumerate([250, 1, 1]):
        for layer_idx, layer in cache.layers.items():
            seed = 10 * step + layer_idx
            keys, values = (backend.normal((2, 2, n_tokens, 64), seed + 100 * i) for i in (1, 2))
            layer.append(keys, values, spec)
            if n_tokens == 1:
                queries = 2 * backend.normal((2, 8, 1, 64), seed + 300)
                outputs.append(backend.to_numpy(layer.attend(queries, 0.125, None)))
    assert all(layer.is_compressed for layer in cache.layers.values())
    return np.stack(outputs)


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


FAULTS = [
    ("reconstruct_rows", "reconstruct_rows", "position + ids", "position + ids + 1"),
    ("reconstruct_rows", "reconstruct_rows", "head * basis_head", "0 * basis_head"),
    ("reconstruct_rows", "reconstruct_rows", "selected < n_rows", "selected < n_rows - 1"),
    ("reconstruct_rows", "common", "is_turned, rope_scale, 1.0", "is_turned, 1.0, 1.0"),
    ("selected_attention", "selected_attention", "position + rows", "position + rows + 1"),
    ("selected_attention", "selected_attention", "head * basis_head", "0 * basis_head"),
    (
        "selected_attention",
        "selected_attention",
        "n_chunks * CHUNK_SIZE\n",
        "n_chunks * CHUNK_SIZE - 1\n",
    ),
    ("selected_attention", "common", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    ("selected_attention", "common", "else n_dense)", "else n_dense - 1)"),
    ("selected_attention", "common", "(head // SHARING) * basis_head", "0 * basis_head"),
    ("lowrank_attention", "lowrank_attention", "position + rows", "position + rows + 1"),
    ("lowrank_attention", "lowrank_attention", "head * basis_head", "0 * basis_head"),
    ("lowrank_attention", "lowrank_attention", "rows < end", "rows < end - 1"),
    ("lowrank_attention", "lowrank_attention", "products * scale", "products"),
    ("lowrank_attention", "lowrank_attention", "part * shrunk[:, None]", "part"),
    ("chunk_scores", "chunk_scores", "product *= scale", "product *= 1.0"),
    ("chunk_scores", "chunk_scores", "rows = at * n_chunks + chunks", "rows = chunks"),
    ("chunk_scores", "chunk_scores", "bias[:, None] * query_sum[None, :]", "0.0"),
]


def load_copy(folder: Path, name: str, old: str = "", new: str = "", file: str = "") -> Any:
    """Import a copy of the kernels, one file of which is edited."""
    source = Path(triton_kernels.__file__).parent
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / name).glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            assert old in text, f"{file}.py has no {old!r}"
            text = text.replace(old, new)
        path.write_text(text.replace(triton_kernels.__name__, name))
    return importlib.import_module(name)


def kernel_error(kernel: Any, backend: Backend, reference: Backend, operation: str) -> float:
    """Error over the tolerance; infinite where something was left unwritten."""
    if operation == "chunk_scores":
        args = make_scores_case(backend, "float16", 40)
        return scores_error(kernel(*args), args, reference) / TOLERANCE["float32"]
    case = DecodeCase(136, 8, 2, 64, 37, 50, n_dense=9, n_selected_chunks=9, rope_scale=1.2)
    inputs = make_inputs(backend, case, "float32")
    # rows that a fault may drop matter: the last of each kind of rows resembles the queries
    inputs.keys[..., -1, :] *= 3
    last = inputs.chunks[..., -1].flatten()[-1] * CHUNK_SIZE + CHUNK_SIZE - 1
    inputs.segment.latent_k[:, [int(last), -1]] *= 3
    if operation == "lowrank_attention":
        # several blocks a split, as in a long segment
        sys.modules[kernel._kernel.__module__].MAX_SPLITS = 2
    args = arguments(operation, inputs)
    want = reference.to_numpy(getattr(reference, operation)(*exact(args, reference)))
    got = backend.to_numpy(kernel(*args))
    return relative_error(got, want) / TOLERANCE["float32"] if np.isfinite(got).all() else np.inf


@pytest.mark.parametrize("operation", [*OPERATIONS, "chunk_scores"])
def test_fault_table_starts_from_right_kernels(
    backend: Backend,
    reference: Backend,
    operation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, f"right_{operation}")
    kernel = copy.TritonKernel(operation)
    assert kernel_error(kernel, backend, reference, operation) <= 1


@pytest.mark.parametrize(
    ("operation", "file", "old", "new"), FAULTS, ids=[f"{x[0]}-{x[3].strip()}" for x in FAULTS]
)
def test_planted_fault_exceeds_tolerance(
    backend: Backend,
    reference: Backend,
    operation: str,
    file: str,
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"faulty_{FAULTS.index((operation, file, old, new))}"
    kernel = load_copy(tmp_path, name, old, new, file).TritonKernel(operation)
    assert kernel_error(kernel, backend, reference, operation) > 10


def test_auto_replaces_wrong_kernel(
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    copy = load_copy(tmp_path, "wrong", "position + rows", "position - rows", "selected_attention")
    monkeypatch.setattr(triton_kernels, "SELECTED_ATTENTION", copy.SELECTED_ATTENTION)
    auto = xkv.load_backend("torch", device=str(backend.device), kernels="auto")
    args = arguments("selected_attention", make_inputs(auto, CASES[0], "float32"))
    for _ in range(2):
        auto.selected_attention(*args)
    assert auto.kernels.last_path["selected_attention"] == "plain"
    told = [x for x in caplog.records if "disagrees" in x.getMessage()]
    assert [x.levelno for x in told] == [logging.WARNING]


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
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    compiled = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_compile.py"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    names, sizes = zip(*map(str.split, compiled.stdout.splitlines()), strict=True)
    assert len(set(names)) == 7, compiled.stdout
    # what a program of compute capability 8.6, which has the least, may use
    assert max(map(int, sizes)) <= 99 * 1024
