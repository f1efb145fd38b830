"""Summaries of an evaluation: tables, intervals, and what is counted."""

import math

import pytest

from xkv.evaluation.summary import Cell, collect, csv_text, markdown, rows_of


def make_line(task, method, ratio, scores, held=50, **more):
    answers = [{"score": score} for score in scores]
    base = {"task": task, "length": 1000, "seed": 1, "method": method, "ratio": ratio}
    return {**base, "dense_bytes": 100, "held_bytes": held, "answers": answers, **more}


def test_summary_counts_what_the_full_cache_can_do():
    lines = [
        make_line("needle", "full", None, [1, 1, 1, 1], held=100),
        make_line("common_words", "full", None, [0.5, 0.7], held=100),
        make_line("needle", "xkv", 2.0, [1, 0]),
        make_line("needle", "xkv", 2.0, [1, 0]),
        make_line("common_words", "xkv", 2.0, [0, 0]),
        {**make_line("needle", "svd", 2.0, []), "problem": "kept dense: too short"},
    ]
    cells = collect(lines)
    full, mine, svd = rows_of(cells, 1000)
    assert full.counted == ("needle",)
    assert (full.mean, mine.mean, mine.held_ratio) == (1.0, 0.5, 2.0)
    assert not svd.done
    text = markdown(cells)
    assert "common_words *" in text and "**50.0%** ±35.0" in text
    assert "svd at 2x: kept dense: too short" in text
    header, *rows = (line.split(",") for line in csv_text(cells).splitlines())
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["n"] for row in table] == ["4", "2", "4", "2", "0"]
    assert float(table[2]["score"]) == 0.5 and float(table[2]["held_ratio"]) == 2


def test_summary_says_what_the_full_cache_cannot_do():
    lines = [
        make_line(task, method, None, scores)
        for task, scores in (("needle", [1, 1]), ("qa", [0.5, 0.5]), ("variables", [0.5, 0.4]))
        for method in ("full", "quantized")
    ]
    text = markdown(collect(lines))
    assert "right in less than 90%: qa, variables.\n" in text
    assert "In no claim, as the full cache cannot do them: variables.\n" in text
    assert "In no claim" not in markdown(collect(lines[:4]))


def test_interval_is_wilsons():
    cell = Cell("needle", 1000, "xkv", 4.0, scores=[1.0] * 81 + [0.0] * 182)
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263
    assert cell.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_question_aware_methods_say_so():
    text = markdown(
        collect(
            [make_line("needle", "full", None, [1]), make_line("needle", "snapkv-query", 4.0, [1])]
        )
    )
    assert "snapkv-query at 4x (sees the question)" in text


def test_perplexity_table_shows_the_mean():
    lines = [
        make_line("ppl", "full", None, [], nll=1.0, kl=0.0),
        make_line("ppl", "full", None, [], nll=3.0, kl=0.0),
        make_line("ppl", "xkv", 2.0, [], nll=2.0, kl=0.25),
    ]
    text = markdown(collect(lines))
    assert f"{math.exp(2):.3f}" in text and "0.25000" in text
