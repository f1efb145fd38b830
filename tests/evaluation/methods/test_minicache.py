"""MiniCache: layers that share directions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.methods.documents import (
    EXACT,
    N_KV_HEADS,
    make_document,
    normal,
    numpy_rows,
)
from xkv import InputError
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method


def test_minicache_of_equal_layers_is_exact(backend):
    rows = [normal(1, N_KV_HEADS, 60, 32, seed=i // 2) for i in range(4)]
    document = make_document(backend, 60, keys=rows, values=rows[::-1])
    text = "minicache:start_share=0,retained_share=0"
    for i, prefix in enumerate(parse_method(text).compress(document, None).start()):
        assert relative_error(backend.to_numpy(prefix.prefix_keys), rows[i]) < EXACT
        assert relative_error(backend.to_numpy(prefix.prefix_values), rows[3 - i]) < EXACT


@pytest.mark.parametrize("name", ["keys", "values"])
def test_minicache_shares_directions_and_retains_the_most_distant_rows(backend, name):
    document = make_document(backend, 60, n_layers=5)
    prefixes = parse_method("minicache:retained_share=0.1").compress(document, None).start()
    exact = numpy_rows(document, name)
    got = [backend.to_numpy(getattr(prefix, f"prefix_{name}")) for prefix in prefixes]
    for i in (0, 1, 4):
        np.testing.assert_array_equal(got[i], exact[i])
    units = [exact[i] / np.linalg.norm(exact[i], axis=-1, keepdims=True) for i in (2, 3)]
    cosines = (units[0] * units[1]).sum(-1)
    shared = units[0] + units[1]
    shared /= np.linalg.norm(shared, axis=-1, keepdims=True)
    is_retained = np.zeros(cosines.shape, bool)
    np.put_along_axis(is_retained, np.argsort(cosines, axis=-1)[..., :6], True, -1)
    for i in (2, 3):
        np.testing.assert_array_equal(got[i][is_retained], exact[i][is_retained])
        want = np.linalg.norm(exact[i], axis=-1, keepdims=True) * shared
        assert relative_error(got[i][~is_retained], want[~is_retained]) < EXACT


def test_minicache_bytes(backend):
    document = make_document(backend, 60, n_layers=5, dtype="float16")
    held = parse_method("minicache:retained_share=0.1").compress(document, None).held_bytes
    row = N_KV_HEADS * 32 * 2
    # a tensor: three layers whole; a direction, norms and retained rows of two, their numbers
    a_tensor = (3 + 1) * 60 * row + 2 * 60 * N_KV_HEADS * 2 + 2 * 6 * row + 6 * N_KV_HEADS * 4
    assert held == 2 * a_tensor


def test_minicache_needs_a_pair(reference):
    with pytest.raises(InputError, match="a partner"):
        parse_method("minicache").compress(make_document(reference, 60, n_layers=2), None)
