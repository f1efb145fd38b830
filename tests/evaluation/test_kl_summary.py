"""Tables of divergence: rows over texts, lines of a plot, and what is left out."""

from __future__ import annotations

import pytest

from xkv.evaluation.kl_summary import MEAN, collect, csv_text, markdown, over_texts


def make_line(text, method, ratio=None, kl=0.1, held=50, n_next=256, **more):
    key = {"task": "kl", "length": 1000, "seed": 1, "method": method, "ratio": ratio}
    if "problem" in more:
        return {**key, "text": text, "n_next": n_next, **more}
    sizes = {"dense_bytes": 100, "held_bytes": held, "tokens": 1000, "detail": ""}
    measured = {"kl": kl, "kl_median": kl / 2, "kl_q99": kl * 9, "same_top": 0.9}
    nll = {"nll": 2.5, "full_nll": 2.25}
    return {**key, "text": text, "n_next": n_next, **sizes, **measured, **nll}


def test_texts_have_a_mean_where_all_have_numbers():
    lines = [
        make_line("a", "full", kl=1e-8, held=100),
        make_line("b", "full", kl=3e-8, held=100),
        make_line("a", "xkv", 4.0, kl=0.1, held=20),
        make_line("b", "xkv", 4.0, kl=0.3, held=30),
        make_line("a", "svd", 4.0),
        make_line("b", "svd", 4.0, problem="too short"),
        make_line("a", "xkv", 4.0, kl=7, n_next=32),
        {"task": "needle", "length": 1000, "seed": 1, "method": "full", "ratio": None},
    ]
    rows = collect(lines, 256)
    full, mine = over_texts(rows, 1000)
    assert (full.text, mine.text) == (MEAN, MEAN)
    assert (mine.kl, mine.held_ratio) == (pytest.approx(0.2), 4.0)
    assert mine.nll_change == pytest.approx(0.25)
    text = markdown(rows, 256, "float16", "float32")
    assert "## 1,000 tokens, mean of 2 texts\n" in text and "– svd at 4x: too short" in text
    assert text.index("mean of 2") < text.index("tokens, a") < text.index("tokens, b")
    assert "| xkv at 4x | 4.00 x | 0.2 | 0.1 | 1.8 | 90.0% | +0.2500 |" in text
    assert "as computed (float32)" in text and "rows in float16" in text
    assert len(csv_text(rows, 256).splitlines()) == 1 + 6 + 2


def test_one_text_is_its_own_mean():
    rows = collect([make_line("a", "full"), make_line("a", "svd", 4.0, problem="no")], 256)
    assert [row.text for row in rows] == ["a", "a"]
    assert [row.method for row in over_texts(rows, 1000)] == ["full"]
    assert collect([make_line("a", "full")], 32) == []
    assert markdown([], 32, "float16", "float32") == ""


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("quantized:bits=4", "quantized"),
        ("quantized:bits=4,group_size=32", "quantized:group_size=32"),
        ("xkv:latent_bits=16,compression=8", "xkv:latent_bits=16"),
        ("xkv", "xkv"),
    ],
)
def test_a_line_of_the_plot_is_a_method_at_all_its_sizes(method, family):
    (row,) = collect([make_line("a", method)], 256)
    assert row.family == family
