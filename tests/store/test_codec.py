"""Factors in few bits: what packing keeps, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xkv import InputError, RopeSpec, XKVConfig, load_backend
from xkv.cache.lowrank_cache import LowRankCache
from xkv.checks.tolerances import relative_error
from xkv.config import BAND
from xkv.ops.attention import reconstruct
from xkv.ops.packed import Packed, unpacked
from xkv.ops.selection import take_rows
from xkv.ops.types import Segment
from xkv.store.bit_plan import Option, smallest_bytes
from xkv.store.codec import pack_basis, pack_latent, pack_part
from xkv.store.factorization import Factorization, factor_rows, pack_together
from xkv.store.rotation import rotate_bands

WIDTHS, BITS = (64, 64, 128, 64), (8, 6, 3, 2)
N_LAYERS, N_KV_HEADS, HEAD_DIM = 2, 2, 64
SPEC = RopeSpec.standard(HEAD_DIM, 10_000.0)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


def packed_segment(backend, dtype: str = "float16") -> tuple[Segment, Segment]:
    """A segment in few bits, and the same numbers as arrays."""
    xp, generator = backend.xp, np.random.default_rng(0)

    def draw(*shape):
        numbers = generator.standard_normal(shape).astype(np.float32)
        return xp.astype(backend.from_numpy(numbers), getattr(xp, dtype))

    rank = sum(WIDTHS)
    factors = [pack_latent(backend, draw(1, 96, rank), WIDTHS, BITS) for _ in range(2)]
    factors += [
        pack_basis(backend, draw(1, rank, N_KV_HEADS, HEAD_DIM) * rank**-0.5, WIDTHS, BITS)
        for _ in range(2)
    ]
    runs = ((96, SPEC),)
    return Segment(*factors, 4, runs), Segment(*(unpacked(backend, x) for x in factors), 4, runs)


def make_cache(backend, decay: float = 20.0, n_tokens: int = 1024, **options) -> LowRankCache:
    """A group of layers whose joint singular values fall exponentially, compressed."""
    generator = np.random.default_rng(0)
    cache = LowRankCache(backend, XKVConfig(attention="dense", **options), [range(N_LAYERS)])
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


def test_operations_on_packed_factors_are_those_on_their_numbers(backend):
    packed, plain = packed_segment(backend, "float32")
    generator = np.random.default_rng(1)
    queries, keys, values = (
        backend.from_numpy(generator.standard_normal(shape).astype(np.float32))
        for shape in ((1, 4, 1, 64), (1, 2, 5, 64), (1, 2, 5, 64))
    )
    rows = backend.from_numpy(np.array([[[0, 95, 7], [63, 64, 7]]], dtype=np.int32))
    for name, operation in {
        "attention": lambda s: backend.lowrank_attention(queries, s, keys, values, 0.3),
        "rows": lambda s: backend.reconstruct_rows(s, rows),
        "keys": lambda s: backend.reconstruct_keys(s),
        "selected": lambda s: backend.selected_attention(
            queries, s, rows[..., :2] // 8, 8, keys, values, 0.3
        ),
    }.items():
        got, want = (backend.to_numpy(operation(s)) for s in (packed, plain))
        assert relative_error(got, want.astype(np.float64)) < 1e-5, name


def test_rows_of_a_packed_latent(backend):
    latent = packed_segment(backend)[0].latent_k
    whole = backend.to_numpy(latent.unpack(backend))
    assert latent.shape == whole.shape == (1, 96, 320)
    part = latent.rows(5, 70)
    np.testing.assert_array_equal(backend.to_numpy(part.unpack(backend)), whole[:, 5:70])
    joined = latent.rows(0, 5).followed_by(backend, part)
    np.testing.assert_array_equal(backend.to_numpy(joined.unpack(backend)), whole[:, :70])
    rows = backend.from_numpy(np.array([[[3, 95], [0, 3]]], dtype=np.int32))
    taken = backend.to_numpy(take_rows(backend, latent, rows))
    np.testing.assert_array_equal(taken[0], whole[0][[[3, 95], [0, 3]]])


def test_bytes_are_those_of_the_arrays(backend):
    latent = packed_segment(backend)[0].latent_k
    bits = sum(width * n_bits for width, n_bits in zip(WIDTHS, BITS, strict=True))
    scales = 2 * 16 * sum(WIDTHS) // BAND
    assert latent.nbytes == 96 * (bits + scales) // 8


def test_rotation_leaves_products_and_evens_out_columns(backend):
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((1, 200, 100)) * np.exp(-np.arange(100) / 8)
    basis = generator.standard_normal((1, 100, 2, 32))
    wide = [backend.from_numpy(x.astype(np.float32)) for x in (latent, basis)]
    turned, (turned_basis,) = rotate_bands(backend, wide[0], [wide[1]], backend.xp.float32)
    assert tuple(turned.shape) == (1, 200, 128)
    got = backend.to_numpy(reconstruct(backend, turned, turned_basis))
    assert relative_error(got, np.einsum("blr,brhd->bhld", latent, basis)) < 1e-5
    spread = backend.to_numpy(turned)[0, :, :BAND].std(axis=0)
    assert spread.max() < 2 * spread.min()


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
    for first, second in zip(*stored, strict=True):
        np.testing.assert_array_equal(first, second)


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


def test_bases_make_up_for_some_of_the_rounding(backend):
    """Columns that are alike are rounded together, and what that takes off can be put back."""
    columns = np.exp(-np.arange(BAND) / 12).astype(np.float32)
    latent = backend.normal((1, 500, BAND), 0) * backend.from_numpy(columns)
    basis = backend.from_numpy(np.eye(BAND, dtype=np.float32).reshape(1, BAND, 1, BAND))
    latent, bases = rotate_bands(backend, latent, (basis,), latent.dtype)
    option = Option(0, 0.0, 2, 16)
    fitted = Factorization(latent, bases, 1.0, 0.0, 1.0).pack(backend, [option])

    def error(basis):
        product = reconstruct(backend, fitted.latent, basis)
        want = reconstruct(backend, latent, bases[0])
        return relative_error(backend.to_numpy(product), backend.to_numpy(want))

    assert error(fitted.bases[0]) < 0.9 * error(bases[0])


def test_latent_has_one_part_for_each_number_of_bits(backend):
    """Whatever the bits of the bases: a Metal kernel takes few arrays."""
    latent, basis = backend.normal((1, 300, 5 * BAND), 0), backend.normal((1, 5 * BAND, 2, 64), 1)
    factored = Factorization(latent, (basis,), 1.0, 0.0, 1.0)
    # the second band is left out, the last is worth more than the one before
    bits = [(6, 8), (0, 0), (6, 4), (3, 4), (6, 4)]
    factors = factored.pack(backend, [Option(0, 0.0, *each) for each in bits])
    assert factors.latent.bits == (6, 3) and factors.latent.widths == (3 * BAND, BAND)
    assert factors.parts() == [(BAND, 6, 8), (2 * BAND, 6, 4), (BAND, 3, 4)]
    kept = np.r_[0:BAND, 2 * BAND : 5 * BAND]
    want = backend.to_numpy(latent)[..., kept] @ backend.to_numpy(basis)[:, kept, 1]
    got = factors.latent.unpack(backend) @ factors.bases[0].unpack(backend)[:, :, 1]
    assert relative_error(backend.to_numpy(got), want.astype(np.float64)) < 0.12


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


def test_needed_bands_are_kept(backend):
    layers = [backend.from_numpy(np.ones((1, 300, 2, 64), np.float32)) for _ in range(2)]
    factored = factor_rows(
        backend, layers, 128, backend.xp.float16, is_rotated=True, power_iterations=1, seed=0
    )
    (factors,) = pack_together(backend, [factored], 1 << 20, min_rank=65)
    assert factors.rank == 128
    needed = smallest_bytes(factored.options(backend, 2))
    with pytest.raises(InputError, match="do not hold 65 columns"):
        pack_together(backend, [factored], needed - 1, min_rank=65)


def test_constant_rows_are_rebuilt(backend):
    cache = LowRankCache(backend, XKVConfig(compression=4), [[0, 1]])
    rows = np.full((1, 2, 400, 64), 3.0, np.float16)
    rows[:, 1] = 0
    for layer in cache.layers.values():
        layer.append(backend.from_numpy(rows), backend.from_numpy(rows), None)
    cache.settle()
    for x in cache.layers[1].dense():
        assert relative_error(backend.to_numpy(x), rows.astype(np.float64)) < 1e-2


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
    assert cache.groups[0].keys.rank == BAND
    assert cache.layers[0].rows.n_segment == 60
    assert value_error(cache) < 0.02


def test_plain_array_is_the_paper_form(backend):
    cache = make_cache(backend, rank_k=40, rank_v=56)
    keys = cache.groups[0].keys
    assert keys.parts() == [(40, 16, 16)]
    assert isinstance(keys.latent, Packed) and keys.latent.array is not None
    assert not isinstance(cache.layers[0].view.segment().latent_k, Packed)
