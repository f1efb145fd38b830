"""``python -m xkv.inspect``: numbers against direct computation, and the files it writes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from xkv import InputError, XKVConfig, inspect
from xkv.evaluation import inspection
from xkv.evaluation.methods.lowrank import compressed_cache
from xkv.planning.grouping import layers_text
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

TEXT = make_document(seed=4, n_tokens=400).text
CONFIG = XKVConfig(groups=((0, 1, 2), (3, 4, 5, 6)), rank_k=40, rank_v=56, window=24)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def report(model):
    return inspection.inspect(model, TEXT, CONFIG, 2)


def test_spectra_fall_and_hold_all_energy(report):
    assert [(x["group"], x["tensor"]) for x in report["spectra"]] == [
        (group, tensor) for group in (0, 1) for tensor in inspection.TENSORS
    ]
    for entry in report["spectra"]:
        joint, single = np.array(entry["joint"]), np.array(entry["single"])
        assert single.shape == (len(entry["layers"]), 128)
        assert (np.diff(joint) <= 0).all() and (np.diff(single) <= 0).all()
        assert (joint**2).sum() == pytest.approx((single**2).sum(), rel=1e-3)
        # each layer alone has at most the joint energy of as many columns
        assert joint[0] >= single[:, 0].max() * (1 - 1e-3)
        for name in ("joint_curve", "single_curve"):
            error = np.array(entry[name]["error"])
            assert error[0] == pytest.approx(1, abs=1e-3) and error[-1] < 0.02
            assert (np.diff(error) <= 0).all()
        n_rows, width = report["n_compressed"], 128 * len(entry["layers"])
        share = entry["joint_curve"]["share_of_dense"][10]
        assert share == pytest.approx(10 * (n_rows + width) / (n_rows * width), rel=1e-3)


def test_errors_are_those_of_the_factors(model, report):
    """Against the product of the factors, un-rotated, in float64."""
    document = model.prefill(model.context_tokens(TEXT), seed=0)
    cache = compressed_cache(document, CONFIG)
    to_numpy = document.backend.to_numpy
    for tensor in inspection.TENSORS:
        errors = report["errors"][tensor]
        assert errors[7] is None
        for number, layers in enumerate(CONFIG.groups):
            factors = getattr(cache.groups[number], tensor)
            latent = to_numpy(factors.latent.unpack(document.backend))[0].astype(np.float64)
            squared = energy = 0.0
            for layer, basis in zip(layers, factors.basis.layers, strict=True):
                rows = to_numpy(document.plain_rows(tensor, layer)).astype(np.float64)
                rows = rows[CONFIG.sinks : CONFIG.sinks + len(latent)]
                lost = np.linalg.norm(
                    latent @ to_numpy(basis.unpack(document.backend))[0].reshape(len(latent[0]), -1)
                    - rows
                )
                assert errors[layer] == pytest.approx(lost / np.linalg.norm(rows), rel=1e-3)
                squared, energy = squared + lost**2, energy + np.linalg.norm(rows) ** 2
            entry = report["spectra"][2 * number + inspection.TENSORS.index(tensor)]
            best = entry["joint_curve"]["error"][entry["rank"]]
            assert best * 0.98 <= (squared / energy) ** 0.5 <= best * 1.04


def test_similarity_and_bands(report):
    for tensor in inspection.TENSORS:
        matrix = np.array(report["similarity"][tensor])
        assert matrix.shape == (8, 8) and (matrix == matrix.T).all()
        assert (matrix.diagonal() == 1).all() and 0 < matrix.min() < 0.6
    ranks = {"keys": 40, "values": 56}
    assert [
        (band["group"], band["tensor"], band["first_column"], band["n_columns"])
        for band in report["bands"]
    ] == [(group, tensor, 0, ranks[tensor]) for group in (0, 1) for tensor in inspection.TENSORS]
    assert {band["latent_bits"] for band in report["bands"]} == {16}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    code = 0
    try:
        inspect.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_command_writes_page_plots_and_numbers(capsys, tmp_path):
    out = tmp_path / "deep" / "out"
    flags = ["--backend", "torch", "--prompt", TEXT, "--out", str(out), "--group-size", "3"]
    code, printed, _ = run(capsys, *flags, "--compression", "2", "--steps", "3")
    assert code == 0
    report = json.loads((out / "inspect.json").read_text())
    assert report["groups"] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert report["dense_bytes"] / report["held_bytes"] == pytest.approx(2, rel=0.05)
    plots = {path.stem: path.read_bytes() for path in out.glob("*.png")}
    of_set = {"working_set", "repeats"}
    names = {"spectra", "similarity", "errors", "bands"} | of_set
    assert set(plots) == set(report["captions"]) == names
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in plots.values())
    for caption in report["captions"].values():
        assert caption in printed and "Look" in caption
    story = report["working_set"]
    assert len(story["tokens"]) == story["n_opening"] + 3
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "python -m xkv.inspect --backend torch --prompt" in page and "--steps 3" in page
    # the command, with a prompt cut short
    assert "…" in report["command"] and len(report["command"]) < 400
    assert f"| 7 | 2 | {report['errors']['keys'][7]:.4f} |" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-size", "0"], "nothing to inspect"),
        (["--prompt", TEXT, "--steps", "0"], "--steps 0 must be at least 1"),
        (["--prompt", "too short"], "at least 256"),
        (["--prompt", TEXT, "--compression", "200"], "too few for a compression of 200"),
        (
            ["--prompt", TEXT, "--compression", "2", "--out", "/proc/none"],
            "cannot write to /proc/none",
        ),
    ],
)
def test_command_refuses_in_one_sentence(capsys, flags, words):
    code, out, err = run(capsys, "--backend", "torch", *flags)
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_missing_matplotlib_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "--prompt", TEXT)
    assert code == 2
    assert err.strip() == "error: the plot needs matplotlib: pip install 'xkv[evaluate]'"


def test_layers_text():
    assert [layers_text(x) for x in ((3,), (0, 1, 2), (0, 2), (2, 1))] == ["3", "0-2", "0+2", "2+1"]


def test_rows_that_are_not_finite_are_refused(model, monkeypatch):
    whole = model.prefill

    def broken(tokens, seed):
        document = whole(tokens, seed)
        spoilt = document.values[2] * float("inf")
        values = (*document.values[:2], spoilt, *document.values[3:])
        return document.__class__(**{**vars(document), "values": values})

    monkeypatch.setattr(model, "prefill", broken)
    with pytest.raises(InputError, match="values of layer 2 hold NaN or infinity"):
        inspection.inspect(model, TEXT, CONFIG)
