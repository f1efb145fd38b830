"""Factors in few bits: what packing keeps, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xkv import InputError, RopeSpec, XKVConfig, load_backend
from xkv.cache.lowrank_cache import LowRankCache
from xkv.checks.tolerances import relative_error
from xkv.config import BAND
from xkv.ops.attention import take_rows
from xkv.ops.latent import Latent
from xkv.store.bit_plan import Option, arrange
from xkv.store.codec import BASIS_BITS, ROUNDING, pack_latent, pack_part
from xkv.store.prompt_basis import measure, packed_bases
from xkv.store.rotation import rotate_bands
from xkv.store.store import store_rows

BITS = (8, 6, 3, 3, 2)
N_LAYERS, N_KV_HEADS, HEAD_DIM = 2, 2, 64
SPEC = RopeSpec.standard(HEAD_DIM, 10_000.0)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


def packed_latent(backend) -> Latent:
    numbers = np.random.default_rng(0).standard_normal((1, 96, BAND * len(BITS)))
    return pack_latent(backend, backend.from_numpy(numbers.astype(np.float16)), BITS)


def make_cache(backend, decay: float = 20.0, n_tokens: int = 1024, **options) -> LowRankCache:
    """A group of layers whose joint singular values fall exponentially, compressed."""
    generator = np.random.default_rng(0)
    cache = LowRankCache(backend, XKVConfig(attention="exact", **options), [range(N_LAYERS)])
    n_columns = N_LAYERS * N_KV_HEADS * HEAD_DIM
    shape = (n_tokens, N_LAYERS, 1, N_KV_HEADS, HEAD_DIM)
    rows = []
    for _ in range(2):
        latent = generator.standard_normal((n_tokens, n_columns)) * np.exp(
            -np.arange(n_columns) / decay
        )
        mixed = latent @ generator.standard_normal((n_columns, n_columns))
        rows.append(mixed.reshape(shape).transpose(1, 2, 3, 0, 4).astype(np.float16))
    cache.rows = rows
    for layer, keys, values in zip(cache.layers.values(), *rows, strict=True):
        layer.append(*(backend.from_numpy(np.ascontiguousarray(x)) for x in (keys, values)), None)
    cache.settle()
    return cache


def value_error(cache: LowRankCache) -> float:
    got = [layer.dense()[1] for layer in cache.layers.values()]
    numbers = np.stack([cache.backend.to_numpy(x) for x in got]).astype(np.float64)
    want = cache.rows[1].astype(np.float64)
    return float(np.linalg.norm(numbers - want) / np.linalg.norm(want))


def test_rows_of_a_packed_latent(backend):
    latent = packed_latent(backend)
    whole = backend.to_numpy(latent.unpack(backend))
    assert latent.shape == whole.shape == (1, 96, 320)
    part = latent.rows(5, 70)
    np.testing.assert_array_equal(backend.to_numpy(part.unpack(backend)), whole[:, 5:70])
    joined = Latent.joined(backend, [latent.rows(0, 5), part])
    np.testing.assert_array_equal(backend.to_numpy(joined.unpack(backend)), whole[:, :70])
    rows = backend.from_numpy(np.array([[[3, 95], [0, 3]]], dtype=np.int32))
    taken = backend.to_numpy(take_rows(backend, latent, rows).unpack(backend))
    np.testing.assert_array_equal(taken[0], whole[0][[[3, 95], [0, 3]]])


def test_bytes_are_those_of_the_arrays(backend):
    latent = packed_latent(backend)
    assert latent.nbytes == 96 * (BAND * sum(BITS) + 2 * 16 * len(BITS)) // 8


def test_bands_are_cut_out_and_widened(backend):
    latent = packed_latent(backend)
    whole = backend.to_numpy(latent.unpack(backend))
    for start, end in ((0, 1), (1, 3), (2, 5)):
        part = backend.to_numpy(latent.bands(start, end).unpack(backend))
        np.testing.assert_array_equal(part, whole[..., BAND * start : BAND * end])
    wide = backend.to_numpy(latent.unpack(backend, backend.xp.float32))
    assert wide.dtype == np.float32
    assert relative_error(whole, wide.astype(np.float64)) < 1e-3


def test_rotation_leaves_products_and_evens_out_columns(backend):
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((1, 200, 128)) * np.exp(-np.arange(128) / 8)
    basis = np.linalg.qr(generator.standard_normal((128, 128)))[0].reshape(1, 128, 2, 64)
    rows = np.einsum("blr,brhd->blhd", latent, basis).reshape(200, 128)
    given = backend.from_numpy(basis.astype(np.float32))
    turned = backend.to_numpy(rotate_bands(backend, given, backend.xp.float32)).reshape(128, 128)
    projected = rows @ turned.T
    assert relative_error(projected @ turned, rows) < 1e-5
    spread = projected[:, :BAND].std(axis=0)
    assert spread.max() < 2 * spread.min()


@pytest.mark.parametrize("bits", BASIS_BITS)
def test_rounding_of_normal_numbers_is_what_plans_count_on(backend, bits):
    """In a basis' larger groups it is up to a half more."""
    x = backend.normal((1, 4000, 2 * BAND), 0)
    for largest, slack in ((BAND, 0.04), (2 * BAND, 0.5)):
        back = pack_part(backend, x, bits, largest).unpack(backend)
        lost = float(backend.xp.mean((back - x) ** 2))
        assert lost == pytest.approx(ROUNDING[bits], rel=slack)


@pytest.mark.parametrize("compression", [2, 4, 8, 12])
@pytest.mark.parametrize("decay", [20.0, 300.0])
def test_compression_is_met_within_three_percent(backend, compression, decay):
    cache = make_cache(backend, decay, compression=compression)
    assert cache.dense_bytes() / cache.held_bytes() == pytest.approx(compression, rel=0.03)
    assert cache.held_bytes() <= 1.001 * cache.dense_bytes() / compression


def test_bits_beat_the_same_bytes_in_sixteen(backend):
    for compression in (4, 8):
        ours, paper = (
            value_error(make_cache(backend, compression=compression, latent_bits=bits))
            for bits in ("auto", 16)
        )
        assert ours < 0.5 * paper


def test_error_falls_with_the_bytes(backend):
    errors = [value_error(make_cache(backend, compression=ratio)) for ratio in (12, 8, 4, 2)]
    assert all(after < before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_both_backends_store_the_same_words(bits, dtype):
    numbers = np.random.default_rng(0).standard_normal((1, 40, 2 * BAND)).astype(np.float32)
    numbers[0, 0], numbers[0, 1], numbers[0, 2] = 3.0, np.abs(numbers[0, 1]), 0.0
    stored = []
    for name in ("mlx", "torch"):
        backend = load_backend(name)
        x = backend.xp.astype(backend.from_numpy(numbers), getattr(backend.xp, dtype))
        words, *scales = pack_part(backend, x, bits).arrays
        stored.append([backend.to_numpy(words).view(np.uint32), *map(backend.to_numpy, scales)])
    np.testing.assert_array_equal(*(x[0] for x in stored))
    for first, second in zip(*(x[1:] for x in stored), strict=True):
        # means are summed in another order
        np.testing.assert_allclose(first, second, rtol=2e-6)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.87), (4, 0.94)])
def test_few_bits_lose_less_than_over_the_whole_range(backend, bits, gain):
    x = backend.normal((1, 2000, BAND), 0)

    def error(arrays):
        back = backend.dequantize(arrays, BAND, bits)
        return float(backend.xp.sum((back - x) ** 2))

    ours = error(pack_part(backend, x, bits).arrays)
    assert ours < gain * error(backend.quantize(x, BAND, bits))


@pytest.mark.parametrize("fill", [0.0, 3.0, -3.0])
def test_constant_groups_stay_exact_in_few_bits(backend, fill):
    x = backend.from_numpy(np.full((1, 4, BAND), fill, np.float32))
    np.testing.assert_array_equal(backend.to_numpy(pack_part(backend, x, 2).unpack(backend)), fill)


def prompt_rows(backend, decay: float = 40.0):
    """300 rows of one layer whose energies fall, and how they are read."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1, 300, 320)) * np.exp(-np.arange(320) / decay)
    rows = rows @ np.linalg.qr(generator.standard_normal((320, 320)))[0]
    rows = rows.reshape(1, 300, 5, 64).astype(np.float32)
    return rows, lambda start, end: [backend.from_numpy(rows[:, start:end])]


def test_latents_make_up_for_the_rounding_of_their_basis(backend):
    """They are the coordinates that fit best in the basis as it is stored."""
    rows, read = prompt_rows(backend)
    spectrum = measure(backend, read, 300, 320, backend.xp.float32, power_iterations=3, seed=0)
    (basis,) = packed_bases(backend, [spectrum], 300, 80_000, backend.xp.float32)
    assert min(basis.layers[0].bits) < 8
    stored = store_rows(backend, basis, read, 300, backend.xp.float32, None)
    matrix = backend.to_numpy(basis.layers[0].unpack(backend)).reshape(basis.layers[0].rank, -1)
    flat = rows.reshape(300, -1).astype(np.float64)
    plain = flat @ matrix.T @ matrix - flat
    fitted = backend.to_numpy(stored.latent.unpack(backend))[0] @ matrix - flat
    assert np.linalg.norm(fitted) < np.linalg.norm(plain)
    assert stored.error == pytest.approx(np.linalg.norm(fitted) / np.linalg.norm(flat), rel=1e-3)


def test_bands_of_equal_bits_are_neighbours(backend, monkeypatch):
    """Whatever the bits of the bases: they are widened together."""
    # the second band is left out, the last is worth more than the one before
    bits = [(6, 8), (0, 0), (6, 4), (3, 4), (6, 4)]
    monkeypatch.setattr(
        "xkv.store.prompt_basis.plan_bits", lambda *_: [[Option(0, 0.0, *each) for each in bits]]
    )
    _, read = prompt_rows(backend)
    dtype = backend.xp.float32
    spectrum = measure(backend, read, 300, 320, dtype, power_iterations=3, seed=0)
    (basis,) = packed_bases(backend, [spectrum], 300, 1 << 20, dtype)
    assert basis.bits == (6, 6, 6, 3)
    stored = store_rows(backend, basis, read, 300, dtype, None)
    assert stored.parts() == [(BAND, 6, 8), (2 * BAND, 6, 4), (BAND, 3, 4)]
    kept = np.r_[0:BAND, 2 * BAND : 3 * BAND, 4 * BAND : 5 * BAND, 3 * BAND : 4 * BAND]
    arranged = backend.to_numpy(spectrum.directions)[0].T[arrange(320, 5)]
    turned = rotate_bands(backend, backend.from_numpy(arranged.reshape(1, 320, 5, 64)), dtype)
    want = backend.to_numpy(turned)[:, kept]
    got = backend.to_numpy(basis.layers[0].unpack(backend))
    assert relative_error(got, want.astype(np.float64)) < 0.12


def test_both_backends_pack_the_same_factors():
    caches = [make_cache(load_backend(name), compression=6) for name in ("mlx", "torch")]
    parts = [[cache.groups[0].keys.parts(), cache.groups[0].values.parts()] for cache in caches]
    assert parts[0] == parts[1]
    first, second = (
        np.stack([np.array(cache.backend.to_numpy(x.dense()[1])) for x in cache.layers.values()])
        for cache in caches
    )
    # two quantizations of the same rows differ by no more than each does from them
    assert relative_error(first, second.astype(np.float64)) < 2 * value_error(caches[0])


def test_a_budget_below_one_band_is_refused(backend):
    _, read = prompt_rows(backend)
    dtype = backend.xp.float16
    spectrum = measure(backend, read, 300, 64, dtype, power_iterations=1, seed=0)
    with pytest.raises(InputError, match="do not hold 64 columns"):
        packed_bases(backend, [spectrum], 300, 1000, dtype)


def test_constant_rows_are_rebuilt(backend):
    cache = LowRankCache(backend, XKVConfig(compression=4), [[0, 1]])
    rows = np.full((1, 2, 400, 64), 3.0, np.float16)
    rows[:, 1] = 0
    for layer in cache.layers.values():
        layer.append(backend.from_numpy(rows), backend.from_numpy(rows), None)
    cache.settle()
    for x in cache.layers[1].dense():
        assert relative_error(backend.to_numpy(x), rows.astype(np.float64)) < 2e-2


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("bits", ["auto", 16])
def test_numbers_that_are_not_finite_are_refused(backend, number, bits):
    cache = LowRankCache(backend, XKVConfig(compression=4, latent_bits=bits), [[0, 1]])
    rows = np.ones((1, 2, 600, 64), np.float16)
    rows[0, 0, 300, 5] = number
    for layer in cache.layers.values():
        layer.append(backend.from_numpy(rows), backend.from_numpy(rows), None)
    with pytest.raises(InputError, match="NaN or infinity"):
        cache.settle()


def test_a_prompt_shorter_than_a_band_is_factored(backend):
    cache = make_cache(backend, n_tokens=100, compression=1.2, window=40, sinks=0)
    assert cache.groups[0].keys.latent.rank == BAND
    assert cache.layers[0].rows.n_segment == 60
    assert value_error(cache) < 0.02


def test_plain_array_is_the_paper_form(backend):
    cache = make_cache(backend, rank_k=40, rank_v=56)
    keys = cache.groups[0].keys
    assert keys.parts() == [(40, 16, 16)]
    assert not keys.latent.is_packed and len(keys.latent.arrays) == 1
