"""The host's time of a step, which a benchmark prints: every kernel is asked, and launched."""

from __future__ import annotations

import mlx.core as mx
import pytest

from xkv.backends.mlx_metal.cli import host_time
from xkv.backends.mlx_metal.kernels import common

KERNELS = set(
    ["attend_dense", "query_terms", "index_scores", "choose_rows", "key_scores", "weigh_rows"]
)


@pytest.mark.skipif(host_time.IS_METAL, reason="kernels run as they are")
def test_all_kernels_are_launched_and_nothing_stays_replaced(monkeypatch):
    launched, original = set(), mx.fast.metal_kernel
    build = common.build

    def spy(name, *args, **kwargs):
        launched.add(name)
        return build(name, *args, **kwargs)

    spy.cache_clear = build.cache_clear
    monkeypatch.setattr(common, "build", spy)
    times = host_time.host_times(n_tokens=1200)
    # their names go on with what a variant reads
    assert {name for name in KERNELS if any(x.startswith(name) for x in launched)} == KERNELS
    forms = [(n, form) for form in ("full", "working set") for n in (1, 4)]
    assert list(times) == forms and min(times.values()) > 0
    # four conversations share each launch
    of_several = {"index_scores_packed", "key_scores_packed", "weigh_rows_packed"}
    assert {x for x in launched if "_each" in x} == {
        "attend_dense_each_recent",
        *(f"{name}_each" for name in of_several),
    }
    assert mx.fast.metal_kernel is original
