"""A 16-bit model that computes in float32 on a CPU, and what its caches hold."""

from __future__ import annotations

import ctypes
import gc
import re

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import xkv
from tests.architectures import build
from tests.mlx_metal import enabled_model
from tests.mlx_metal.enabled_model import EXACT, greedy, new_cache
from xkv import generate
from xkv.backends.mlx_metal.cli import commands
from xkv.backends.mlx_metal.model.enabled import lowrank_cache
from xkv.backends.mlx_metal.model.float32 import compute_in_float32
from xkv.backends.mlx_metal.model.memory import dense_bytes
from xkv.cli import openblas
from xkv.tiny import make_document

# of the tiny models' vocabulary
PROMPT = [token % 256 for token in enabled_model.PROMPT * 2]
LOSSY = {"compression": 1.5, "group_size": 2, "window": 16, "max_tail": 16}


def make(name: str = "llama", dtype: mx.Dtype = mx.bfloat16):
    model = build(name)
    model.set_dtype(dtype)
    return model


def run_prompt(model, cache) -> mx.array:
    logits = model(mx.array(PROMPT)[None], cache=cache)
    mx.eval(logits, [x.state for x in cache])
    return logits


# full attention, sliding windows between full layers, convolutions between them, MLA
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2", "minicpm3"])
def test_rows_are_held_and_counted_in_the_models_own_dtype(name):
    model = make(name)
    sizes, held = [], []
    for is_wide in (False, True):
        if is_wide:
            assert compute_in_float32(model) == mx.bfloat16
        native = new_cache(model)
        assert (run_prompt(model, native).dtype == mx.float32) == is_wide
        kv = [x for x in native if hasattr(x, "keys")]
        assert kv and {x.keys.dtype for x in kv} == {mx.bfloat16}
        xkv.enable(model, **LOSSY)
        cache = new_cache(model)
        greedy(model, cache, PROMPT)
        lowrank = lowrank_cache(cache)
        assert all(x.is_compressed for x in lowrank.layers.values())
        held.append([x.nbytes for x in lowrank.layers.values()])
        sizes.append([dense_bytes(x) for x in (*kv, *cache) if hasattr(x, "offset")])
        xkv.disable(model)
    assert sizes[0] == sizes[1]
    # bases of another dtype would not be these bytes
    assert held[0] == held[1]


def test_it_computes_in_float32_what_was_computed_in_16_bits():
    narrow, wide, reference = (make() for _ in range(3))
    weights = tree_flatten(narrow.parameters())
    for model in (wide, reference):
        model.load_weights(weights)
    reference.set_dtype(mx.float32)
    compute_in_float32(wide)
    want = np.array(reference(mx.array(PROMPT)[None]))
    errors = []
    for model in (narrow, wide):
        got = np.array(run_prompt(model, new_cache(model)).astype(mx.float32))
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    # of its 16 bits only the rows' rounding is left
    assert errors[1] < errors[0] / 2 and errors[1] < 5e-3


def test_at_full_rank_a_step_is_the_full_caches():
    model, question = make(), mx.array([[7]])
    compute_in_float32(model)
    steps = []
    for is_enabled in (False, True):
        if is_enabled:
            xkv.enable(model, **EXACT, attention="exact")
        cache = new_cache(model)
        greedy(model, cache, PROMPT, n_tokens=1)
        steps.append(np.array(model(question, cache=cache)))
    # rows are rounded to bfloat16 once more when they are rebuilt
    assert np.linalg.norm(steps[1] - steps[0]) < 2e-2 * np.linalg.norm(steps[0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_other_models_are_left_as_they_are(dtype):
    model, other = make(), make(dtype=dtype)
    compute_in_float32(model)
    assert compute_in_float32(other) is None
    assert {x.dtype for _, x in tree_flatten(other.parameters())} == {dtype}


def test_caches_round_nothing_once_the_model_is_gone():
    model = make()
    original = mlx_cache.KVCache.update_and_fetch
    compute_in_float32(model)
    assert mlx_cache.KVCache.update_and_fetch is not original
    del model
    gc.collect()
    assert mlx_cache.KVCache.update_and_fetch is original


@pytest.mark.parametrize(
    ("is_wanted", "is_loaded", "said"),
    [
        (True, True, "MLX computes in float32 with OpenBLAS here, and rows are held in float16"),
        (True, False, openblas.ADVICE),
        (False, True, None),
    ],
)
@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs multiply 16 bits")
def test_a_command_says_what_it_computes_in(monkeypatch, capsys, is_wanted, is_loaded, said):
    monkeypatch.setattr(openblas, "is_wanted", lambda: is_wanted)
    monkeypatch.setattr(openblas, "is_loaded", lambda: is_loaded)
    seen = []
    take_model = commands.Command.speed_up

    def speed_up(command, model):
        take_model(command, model)
        seen.append({x.dtype for _, x in tree_flatten(model.parameters())})

    monkeypatch.setattr(commands.Command, "speed_up", speed_up)
    text = make_document(seed=3, n_tokens=200).text
    generate.main(["--prompt", text, "--max-tokens", "2", "--compression", "2"])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "BLAS" in line]
    assert len(lines) == (said is not None) and all(line.startswith(said) for line in lines)
    assert seen == [{mx.float32 if is_wanted and is_loaded else mx.float16}]
    assert re.search(r"KV cache: 0\.8\d+ MB dense", out)


@pytest.mark.skipif(not openblas.is_loaded(), reason="MLX has its own BLAS in this process")
def test_openblas_has_one_thread_while_an_answer_is_decoded():
    library = ctypes.CDLL(None)
    n_threads = library.openblas_get_num_threads()
    library.openblas_set_num_threads(2)
    try:
        model = make()
        xkv.enable(model, **LOSSY)
        answers = [
            generate_step(mx.array(PROMPT), model, max_tokens=9, prompt_cache=new_cache(model))
            for _ in range(2)
        ]
        # one that is left early, in the middle of another
        for answer in answers:
            next(answer)
            assert library.openblas_get_num_threads() == 1
        answers[0].close()
        assert library.openblas_get_num_threads() == 1
        assert len(list(answers[1])) == 8
        assert library.openblas_get_num_threads() == 2
    finally:
        library.openblas_set_num_threads(n_threads)
