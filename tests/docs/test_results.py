"""Results: pages are what the records say, and no broken record changes anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import add_result, summarize_results
from scripts.results_cells import plain, small
from scripts.results_named import NAMED
from scripts.results_tables import TABLES
from scripts.summarize_results import ROOT, TITLES, differing, fill, read_records, rebuilt
from tests.docs.records import KL, ROWS, SHOWN, as_json, contents, make, make_folder
from xkv.cli.record_kinds import KINDS
from xkv.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small repository, rebuilt."""
    root = make_folder(tmp_path / "repository")
    for module in (summarize_results, add_result):
        monkeypatch.setattr(module, "ROOT", root)
    run(monkeypatch, summarize_results)
    return root


def run(monkeypatch, script, *flags):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def test_pages_are_what_the_records_say():
    assert not [str(path) for path in differing(rebuilt(ROOT, read_records(ROOT)))]


def test_every_record_has_its_section():
    records = read_records(ROOT)
    page = (ROOT / "BENCHMARKS.md").read_text()
    for name, record in records.items():
        assert f"[{name}](scripts/results/{name})" in page and record.command in page
    assert set(TITLES) == set(TABLES) == set(KINDS)


@pytest.mark.parametrize(
    "form", [["-m", "scripts.summarize_results"], ["scripts/summarize_results.py"]]
)
def test_command_runs_as_a_module_and_as_a_file(form):
    done = subprocess.run(
        [sys.executable, *form, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "--check" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_page_has_a_section_a_kind_with_problems_in_it(kind):
    page = summarize_results.benchmarks({"some.json": make(kind)})
    assert f"## {TITLES[kind]}\n\n### some/Model-1B on mlx, Apple M3 Max, 2026-11-26\n" in page
    assert "* Apple M3 Max, 16 cores, 64 GB, macOS 15.1 arm64, no GPU\n" in page
    assert "* python 3.12.1, xkv 0.1.0\n* dtype float16\n" in page
    assert "* 2026-11-26, commit abc1234, [some.json](scripts/results/some.json)\n" in page
    assert f"\n      python -m xkv.some {kind}\n" in page
    assert SHOWN[kind] in page


def test_check_names_a_page_whose_figure_was_changed(folder, monkeypatch, capsys):
    run(monkeypatch, summarize_results, "--check")
    readme = folder / "README.md"
    text = readme.read_text()
    assert "| full cache in 16 bits | 1.00 x | 95.0 ±7.0 |" in text
    assert text.startswith("Hello.\n\n<!--") and text.endswith("<!-- end -->\n\nBye.\n")
    assert "`python -m xkv.some tasks` (Apple M3 Max, 16 cores," in text
    readme.write_text(text.replace("95.0", "96.0"))
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, summarize_results, "--check")
    assert "error: README.md: not as the results are" in str(stop.value.code)
    assert contents(folder) == before
    run(monkeypatch, summarize_results)
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "<!-- results: speed -->\n<!-- end -->\n",
            "p.md: there is no table 'speed'; tables: real-",
        ),
        (
            "<!-- results: prefill -->\n<!-- end -->\n",
            "p.md: the table 'prefill' needs scripts/results/prefill.json, which is missing",
        ),
        ("<!-- results: tasks -->\nBye\n", "p.md: the table 'tasks' has no line <!-- end -->"),
        (
            "<!-- results: tasks -->\n<!-- results: tasks -->\n<!-- end -->\n",
            "p.md: the table 'tasks' has no line <!-- end -->",
        ),
        (
            "<!-- results: decode -->\n<!-- end -->\n",
            "p.md: scripts/results/decode-mlx.json is of kind 'tasks', not 'decode'",
        ),
    ],
)
def test_marks_that_cannot_be_filled_are_a_sentence(text, words):
    records = {"tasks-bundled.json": make("tasks"), "decode-mlx.json": make("tasks")}
    with pytest.raises(InputError) as error:
        fill(text, records, "p.md")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_named_table_can_be_made():
    records = {file: make(named.kind) for named in NAMED.values() for file in named.files}
    for name in NAMED:
        text = fill(f"<!-- results: {name} -->\n<!-- end -->\n", records, "p.md")
        assert "| --- |" in text and f"`python -m xkv.some {NAMED[name].kind}`" in text


def test_real_model_has_lengths_side_by_side_and_reasons_below():
    rows = [
        *ROWS["kl"],
        {**KL, "length": 7680, "text": "a.txt", "method": "full", "kl": 3e-7},
        {**KL, "length": 7680, "text": "a.txt", "method": "xkv:attention=exact", "ratio": 8.0}
        | {"problem": "too | long"},
    ]
    text = fill(
        "<!-- results: real-model -->\n<!-- end -->\n",
        {"kl-smollm2.json": make("kl", rows=rows)},
        "p.md",
    )
    assert "| method | 2,048 tokens: held | KL mean | same top token | 7,680 tokens: held |" in text
    assert (
        "| full cache in 16 bits (control) | 2.00 x | 0.00000020 | 90.0% | 2.00 x | 0.00000030 |"
        in text
    )
    assert "| xKV at 8x | 2.00 x | 0.0123 | 90.0% | – | – | – |" in text
    assert "– xKV at 8x, 7,680 tokens: too \\| long\n" in text
    assert "– mlx-lm, 4 bits, 2,048 tokens: it was not measured\n" in text


def test_mean_of_tasks_leaves_out_those_the_full_cache_cannot_do():
    easy = {"length": 1024, "held_ratio": 2.0, "n": 40, "low": 0.9, "high": 1.0}
    rows = [
        {**easy, "task": task, "method": method, "ratio": None, "score": score}
        for method, scores in (("full", (1.0, 0.9, 0.2)), ("other", (0.9, 0.7, 0.0)))
        for task, score in zip("abc", scores, strict=True)
    ]
    text = "".join(TABLES["tasks"](make("tasks", rows=rows)))
    assert "| method | held | a | b | c * | mean |" in text
    assert "| other | 2.00 x | 90.0 ±5.0 | 70.0 ±5.0 | 0.0 ±5.0 | **80.0%** ±3.5 |" in text
    assert "not in the mean" in text


def test_hits_name_tasks_that_the_full_cache_cannot_do():
    about = {"task": "recall", "method": "full", "ratio": None, "n": 8}
    rows = [{**about, "scenario": name, "score": share} for name, share in (("a", 1), ("b", 0.25))]
    text = "".join(TABLES["hits"](make("hits", rows=rows)))
    assert (
        "| task | method | a | b |" in text
        and "| recall | full cache in 16 bits | 100.0% |" in text
    )
    assert "The full cache is right in less than 90% of recall.\n" in text
    assert "less than" not in "".join(TABLES["hits"](make("hits", rows=rows[:1])))


def test_added_record_is_in_the_page_and_adding_it_again_changes_nothing(
    folder, tmp_path, monkeypatch, capsys
):
    file = as_json(make("doctor"), tmp_path / "mine.json")
    before = contents(folder)
    run(monkeypatch, add_result, file)
    name = "scripts/results/doctor-apple-m3-max-model-1b-2026-11-26.json"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{name} added, 2 rows; BENCHMARKS.md rebuilt"
    after = contents(folder)
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {str(folder / name), str(folder / "BENCHMARKS.md")}
    assert SHOWN["doctor"] in (folder / "BENCHMARKS.md").read_text()
    run(monkeypatch, summarize_results, "--check")
    run(monkeypatch, add_result, file)
    assert contents(folder) == after


def test_added_record_takes_no_other_ones_place(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, add_result, as_json(make("doctor"), tmp_path / "mine.json"))
    before = contents(folder)
    other = as_json(make("doctor", commit=None), tmp_path / "other.json")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, add_result, other)
    assert stop.value.code == 2 and contents(folder) == before
    assert "is there and holds another result" in capsys.readouterr().err


def test_words_of_a_record_stay_in_their_cell():
    record = make("doctor", rows=[{**ROWS["doctor"][1], "problem": "a | b\n# <script>`x`"}])
    page = summarize_results.benchmarks({"some.json": record})
    assert "| a \\| b # &lt;script>'x' |" in page
    assert plain("<!-- end -->") == "&lt;!-- end -->"
    name = add_result.file_name(make("doctor", model="../../Über ünwise/..", date="2026-01-02"))
    assert name == "doctor-apple-m3-max-unnamed-2026-01-02.json"
    assert Path(name).name == name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.9e-7, "0.00000019"),
        (0.00789, "0.0079"),
        (0.0273, "0.0273"),
        (1.3249, "1.32"),
        (-0.5, "-0.500"),
        (1019.4, "1,019"),
    ],
)
def test_small_numbers_are_written_out(value, text):
    assert small(value) == text
