"""Codes of rotated heads: the levels of the literature, the bytes, and the error they leave."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.methods.documents import N_KV_HEADS, make_document, normal, numpy_rows
from xkv import InputError
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method
from xkv.evaluation.methods.lloydmax import normal_levels

DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Mean squared error for unit variance: Max, 1960, table I."""


def restored(document, text):
    """Rows of all layers as a method gives them back."""
    prefixes = parse_method(text).compress(document, None).start()
    to_numpy = document.backend.to_numpy
    return [to_numpy(x) for prefix in prefixes for x in (prefix.prefix_keys, prefix.prefix_values)]


def exact(document):
    pairs = zip(numpy_rows(document, "keys"), numpy_rows(document, "values"), strict=True)
    return [x for pair in pairs for x in pair]


def test_levels_are_those_of_the_literature():
    assert normal_levels(1)[1] == pytest.approx((2 / np.pi) ** 0.5)
    assert normal_levels(2)[2:] == pytest.approx((0.4528, 1.510), abs=1e-3)
    assert normal_levels(3)[4:] == pytest.approx((0.2451, 0.7560, 1.344, 2.152), abs=1e-3)


@pytest.mark.parametrize("bits", DISTORTION)
def test_error_is_that_of_the_best_levels(backend, bits):
    """The scale is fitted to each group's own numbers, which cannot be worse."""
    document = make_document(backend, 300, n_layers=2, head_dim=64)
    for got, want in zip(restored(document, f"lloydmax:bits={bits}"), exact(document), strict=True):
        assert 0.85 < relative_error(got, want) ** 2 / DISTORTION[bits] < 1.03


def test_a_loud_feature_costs_the_others_less_than_without_the_rotation(backend):
    keys = [normal(1, N_KV_HEADS, 200, 64, seed=i) for i in range(2)]
    for x in keys:
        x[..., 5] *= 30
    document = make_document(backend, 200, n_layers=2, head_dim=64, keys=keys)
    quiet = [i for i in range(64) if i != 5]
    for text, bound in (("lloydmax:bits=4", 0.6), ("quantized:bits=3", 0.6)):
        got = restored(document, text)[0][..., quiet]
        error = relative_error(got, keys[0][..., quiet])
        assert (error < bound) == text.startswith("lloydmax")


@pytest.mark.parametrize("head_dim", [96, 128])
def test_heads_of_other_sizes_come_back(backend, head_dim):
    document = make_document(backend, 50, n_layers=1, head_dim=head_dim)
    for got, want in zip(
        restored(document, "lloydmax:bits=6,group_size=32"), exact(document), strict=True
    ):
        assert got.shape == want.shape
        assert relative_error(got, want) < 0.05


def test_silent_rows_come_back_silent(backend):
    keys = [np.zeros((1, N_KV_HEADS, 20, 64), np.float32)]
    document = make_document(backend, 20, n_layers=1, head_dim=64, keys=keys)
    assert not restored(document, "lloydmax:bits=2")[0].any()


@pytest.mark.parametrize(("bits", "row_bytes"), [(2, 18), (3, 26), (4, 34)])
def test_bytes_are_those_of_codes_and_scales(reference, bits, row_bytes):
    document = make_document(reference, 100, n_layers=2, head_dim=64, dtype="float16")
    held = parse_method(f"lloydmax:bits={bits}").compress(document, None).held_bytes
    assert held == 100 * 2 * 2 * N_KV_HEADS * row_bytes


def test_heads_that_are_no_multiple_of_a_group_are_refused(reference):
    with pytest.raises(InputError, match="heads of 32 features"):
        parse_method("lloydmax").compress(make_document(reference, 50), None)
