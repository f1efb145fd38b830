"""Profiles: measured, kept, refused, and what the command lines make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import mlx_lm
import numpy as np
import pytest

import xkv
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, XKVConfig, cache_prompt, calibrate, evaluate, generate, load_profile
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.cli.engine import load_engine
from xkv.evaluation.run import make_settings
from xkv.planning import layer_groups
from xkv.planning.basis_file import read_basis
from xkv.planning.language_model import load_language_model
from xkv.planning.layer_groups import prompt_tokens
from xkv.planning.profile import ModelIdentity, Profile, find_profile, profile_path
from xkv.tiny import CHECKPOINT_DIR, make_document

TEXT = make_document(seed=3, n_tokens=400).text
IDENTITY = ModelIdentity("llama", 5, 2, 16, 16)
PROFILE = Profile(IDENTITY, ((0,), (1, 2, 3), (4,)), source="by hand")
CONSECUTIVE = ((0, 1, 2, 3), (4,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of five layers, without a profile."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURES["llama"])


@pytest.fixture
def kept(folder):
    """The same model with :data:`PROFILE` in its directory."""
    path = profile_path(str(folder))
    PROFILE.save(path)
    yield folder
    path.unlink()


def run(capsys, command, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command line."""
    code = 0
    try:
        command.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def test_profile_survives_its_file(tmp_path):
    PROFILE.save(tmp_path / "deep" / "p.json")
    assert load_profile(tmp_path / "deep" / "p.json") == PROFILE


def test_profile_of_a_repository_is_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_profile("org/model") is None
    PROFILE.save(profile_path("org/model"))
    assert profile_path("org/model").is_relative_to(tmp_path)
    assert find_profile("org/model") == load_profile("org/model") == PROFILE


CORRUPT = {
    "not JSON": (lambda about: "{", "cannot be read"),
    "a list": (lambda about: [about], "format 1"),
    "another format": (lambda about: about | {"xkv_profile": 2}, "format 1"),
    "no groups": (lambda about: {k: about[k] for k in about if k != "groups"}, "no 'groups'"),
    "groups of text": (lambda about: about | {"groups": [["a"]]}, "no number"),
    "a number": (lambda about: about | {"groups": 3}, "wrong type"),
    "unknown layer": (lambda about: about | {"groups": [[0], [1, 5], [4]]}, "layers 0 to 4"),
    "a layer twice": (lambda about: about | {"groups": [[0], [0, 1], [4]]}, "layer 0 twice"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_profile_is_refused(tmp_path, name):
    change, words = CORRUPT[name]
    path = tmp_path / "p.json"
    PROFILE.save(path)
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=words) as error:
        load_profile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("field", ["model_type", "n_layers", "n_kv_heads", "key_dim", "value_dim"])
def test_profile_of_another_model_is_refused(field):
    other = replace(IDENTITY, **{field: "mistral" if field == "model_type" else 64})
    with pytest.raises(InputError, match="by hand is for llama with 5 layers"):
        PROFILE.apply(XKVConfig(), other)
    assert PROFILE.apply(XKVConfig(compression=8), IDENTITY) == XKVConfig(
        compression=8, groups=PROFILE.groups
    )


def test_calibration_is_the_same_on_both_backends():
    mlx, torch = (
        layer_groups.measure_groups(load_language_model(name, str(CHECKPOINT_DIR)), TEXT, 3)
        for name in ("mlx", "torch")
    )
    assert mlx.groups == torch.groups and mlx.model == torch.model
    assert len(mlx.groups) == 3 and sum(mlx.groups, ()) == tuple(range(8))


def test_plain_rows_undo_a_rope_that_changes_between_calls(folder, tmp_path):
    """The first layer's keys before rotation are the same whatever the rotation is."""
    dynamic = write_checkpoint(tmp_path, ARCHITECTURES["llama-dynamic"])
    rows = []
    for path in (folder, dynamic):
        model = load_language_model("mlx", str(path))
        document = model.prefill(prompt_tokens(model, TEXT + TEXT), 0)
        rows.append(np.array(document.plain_rows("keys", 0)))
    assert len({spec for _, spec in document.rope_runs(0)}) == 2
    assert relative_error(rows[1], rows[0]) < TOLERANCE["float32"]


def test_calibration_of_constant_and_of_broken_rows(folder):
    import torch

    model = load_language_model("torch", str(folder))
    layers = model.model.model.layers
    with torch.no_grad():
        layers[1].self_attn.k_proj.weight.zero_()
        profile = layer_groups.measure_groups(model, TEXT, 2)
        assert sum(profile.groups, ()) == (0, 1, 2, 3, 4)
        layers[2].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="layer 3 hold NaN or infinity"):
        layer_groups.measure_groups(model, TEXT, 2)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_calibrate_command_writes_groups_and_a_basis_for_them(
    capsys, monkeypatch, folder, tmp_path, backend
):
    monkeypatch.setattr("xkv.planning.calibration.N_PIECES", 5)
    monkeypatch.setattr("xkv.planning.calibrate_model.measured_weights", lambda *_: {})
    text, out = tmp_path / "text.txt", tmp_path / "out.safetensors"
    text.write_text(TEXT)
    flags = ["--model", str(folder), "--prompt", str(text), "--group-size", "3", "--cka"]
    code, err = run(capsys, calibrate, *flags, "--backend", backend, "--out", str(out))
    assert code == 0 and f"wrote {folder}" in err and f"kept in {out}" in err
    profile = find_profile(str(folder))
    profile_path(str(folder)).unlink()
    assert profile.model == IDENTITY and len(profile.groups) == 2
    subject = load_engine(backend, str(folder)).subject(XKVConfig(groups=profile.groups))
    read_basis(out, subject.fingerprint, profile.groups, subject.backend)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cka", "--prompt", "too short"], "at least 256"),
        (["--group-size", "0"], "--group-size 0 must be at least 1"),
        (["--text", "/proc/none/t.txt"], "cannot read /proc/none/t.txt"),
    ],
)
def test_calibrate_refuses_in_one_sentence(capsys, folder, flags, words):
    code, err = run(capsys, calibrate, "--model", str(folder), *flags)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


@pytest.fixture
def chosen(capsys, monkeypatch, folder):
    """Runs generate up to its answer: the configuration, or the error."""
    configs = []
    for module in ("xkv.generate", "xkv.backends.mlx_metal.cli.generate"):
        monkeypatch.setattr(
            f"{module}.show_answers",
            lambda answer, config, compare: configs.append(config) or SimpleNamespace(text=""),
        )
    monkeypatch.setattr("xkv.planning.layer_groups.BUILT_IN_TOKENS", 400)

    def choose(backend: str, *flags: str) -> tuple[XKVConfig | None, str]:
        flags = ("--model", str(folder), "--prompt", "hello", "--backend", backend, *flags)
        code, err = run(capsys, generate, *flags)
        return (configs.pop() if code == 0 else None), err

    return choose


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_flags_choose_the_grouping(chosen, kept, tmp_path, backend):
    other = replace(PROFILE, groups=((0, 1), (2,), (3, 4)))
    other.save(tmp_path / "other.json")
    config, err = chosen(backend)
    assert config.groups == PROFILE.groups
    assert f"Layers grouped by {profile_path(str(kept))}: 0, 1-3, 4" in err
    for flags in (["--grouping", "consecutive"], ["--group-size", "4"]):
        config, err = chosen(backend, *flags)
        assert (config.groups, config.group_size) == (None, 4)
        assert "grouped by" not in err
    config, err = chosen(backend, "--grouping", str(tmp_path / "other.json"))
    assert config.groups == other.groups
    config, err = chosen(backend, "--grouping", "cka", "--group-size", "2")
    assert len(config.groups) == 3 and "grouped by this measurement" in err


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_flags_without_a_profile_are_consecutive(chosen, backend):
    config, _ = chosen(backend)
    assert config.groups is None and config.group_size == XKVConfig.group_size


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_flags_that_cannot_be_met(chosen, kept, tmp_path, backend):
    foreign = str(tmp_path / "foreign.json")
    replace(PROFILE, model=replace(IDENTITY, n_layers=6)).save(foreign)
    for flags, words in (
        (["--grouping", "nowhere.json"], "there is no profile nowhere.json"),
        (["--grouping", foreign], f"{foreign} is for llama with 6 layers"),
        (["--grouping", foreign, "--group-size", "2"], "exclude each other"),
        (["--grouping", "cka", "--group-size", "0"], "--grouping contradicts"),
    ):
        config, err = chosen(backend, *flags)
        assert config is None
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last


def test_python_searches_for_no_profile(kept):
    model, _ = mlx_lm.load(str(kept))
    assert [layer.group for layer in xkv.enable(model).layers] == [*[(0, 1, 2, 3)] * 4, (4,)]
    config = load_profile(kept).apply(XKVConfig(), IDENTITY)
    assert [layer.group for layer in xkv.enable(model, config).layers][:2] == [(0,), (1, 2, 3)]


def test_prompt_cache_file_keeps_its_groups(capsys, folder, tmp_path):
    """A file made before a profile goes on after it, and one made with it needs it no more."""
    flags = ["--compression", "2", "--window", "24"]
    files = [str(tmp_path / f"{name}.safetensors") for name in ("plain", "grouped")]
    make = ["--model", str(folder), "--prompt", TEXT, *flags]
    code, err = run(capsys, cache_prompt, *make, "--prompt-cache-file", files[0])
    assert code == 0 and "grouped by" not in err
    PROFILE.save(profile_path(str(folder)))
    try:
        code, err = run(capsys, cache_prompt, *make, "--prompt-cache-file", files[1])
        assert code == 0 and "grouped by" in err and "layer 1-3: compressed" in err
        code, err = run(capsys, generate, "--prompt-cache-file", files[0], "-p", "hello", "-m", "2")
        assert code == 0 and "grouped by" not in err
    finally:
        profile_path(str(folder)).unlink()
    code, _ = run(capsys, generate, "--prompt-cache-file", files[1], "-p", "hello", "-m", "2")
    assert code == 0
    groups = xkv.load_prompt_cache(files[1])[0].layer.cache.config.groups
    assert groups == PROFILE.groups


def test_draft_model_keeps_groups_of_its_own(capsys, kept, tmp_path):
    draft = write_checkpoint(tmp_path, ARCHITECTURES["llama"] | {"num_hidden_layers": 2})
    kinds = replace(IDENTITY, n_layers=2), ((0,), (1,))
    Profile(*kinds).save(profile_path(str(draft)))
    flags = ["--model", str(kept), "--draft-model", str(draft), "--prompt", TEXT, "-m", "2"]
    generate.main([*flags, "--compression", "2", "--window", "24"])
    out, err = capsys.readouterr()
    assert err.count("grouped by") == 1 and "(layers 1+3+1, " in out


def test_evaluation_groups_methods_that_name_no_group_size():
    grouping = {"groups": PROFILE.groups}
    labels = ["xkv", "xkv:group_size=2", "svd", "snapkv"]
    _, *settings = make_settings(labels, [2.0], grouping)
    assert [s.label for s in settings] == labels
    grouped = [dict(s.method.options).get("groups") for s in settings[:3]]
    assert grouped == [PROFILE.groups, None, None]


def test_evaluate_keeps_the_groups_with_its_results(capsys, kept, tmp_path):
    flags = ["--model", str(kept), "--tasks", "needle", "--lengths", "300", "--samples", "1"]
    flags += ["--ratios", "1.5", "--methods", "xkv:window=24", "--out", str(tmp_path / "out")]
    assert run(capsys, evaluate, *flags)[0] == 0
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["groups"] == [[0], [1, 2, 3], [4]]
    assert run(capsys, evaluate, *flags)[0] == 0
    code, err = run(capsys, evaluate, *flags, "--grouping", "consecutive")
    assert code == 2 and "holds results of another run: groups" in err
