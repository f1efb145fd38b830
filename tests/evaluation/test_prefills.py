"""Prefills on disk: read back bit for bit, made once, and never taken for another's."""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields

import numpy as np
import pytest

from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError
from xkv.evaluation.prefills import Prefills, checkpoint_code, make_prefill
from xkv.planning.document import Document
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

LENGTH, N_NEXT = 120, 20


@pytest.fixture(scope="module", params=["mlx", "torch"])
def model(request):
    return load_language_model(request.param, str(CHECKPOINT_DIR))


@pytest.fixture(scope="module")
def tokens(model):
    return model.encode(make_document(1, LENGTH + N_NEXT).text)


@pytest.fixture
def prefills(model, tmp_path):
    return Prefills(tmp_path / "kept", model, "a")


@pytest.fixture
def calls(model, monkeypatch):
    """Lengths of what was prefilled."""
    made = []
    original = type(model).prefill

    def prefill(self, tokens, seed):
        made.append(len(tokens))
        return original(self, tokens, seed)

    monkeypatch.setattr(type(model), "prefill", prefill)
    return made


def get(prefills, tokens):
    return prefills.get(tokens[:LENGTH], tokens[LENGTH:], 7)


def assert_same(got, want):
    """Two prefills, every field of their documents."""
    np.testing.assert_array_equal(got.reference, want.reference)
    to_numpy = got.document.backend.to_numpy
    for field in fields(Document):
        mine, its = (getattr(x.document, field.name) for x in (got, want))
        if not isinstance(mine, tuple) or not hasattr(mine[0], "shape"):
            assert mine == its
            continue
        for a, b in zip(mine, its, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_prefill_comes_back_bit_for_bit(model, tokens, tmp_path, calls, dtype):
    model = copy.copy(model)
    model.kv_dtype = getattr(model.backend.xp, dtype)
    prefills = Prefills(tmp_path, model, "a")
    first = get(prefills, tokens)
    assert calls == [LENGTH]
    forward = type(model).forward
    second = get(prefills, tokens)
    assert calls == [LENGTH] and type(model).forward is forward
    assert_same(second, first)
    assert first.document.keys[0].dtype == model.kv_dtype


def test_reading_runs_no_token_through_the_model(model, prefills, tokens, monkeypatch):
    get(prefills, tokens)
    monkeypatch.setattr(type(model), "forward", lambda *args: pytest.fail("a token was run"))
    assert get(prefills, tokens).document.n_tokens == LENGTH


def test_other_texts_lengths_and_checkpoints_have_files_of_their_own(
    model, prefills, tokens, calls, tmp_path
):
    get(prefills, tokens)
    get(prefills, [*tokens[:5], tokens[4], *tokens[6:]])
    get(prefills, tokens[:-1])
    get(Prefills(prefills.folder, model, "b"), tokens)
    assert len(calls) == len(list(prefills.folder.iterdir())) == 4
    get(prefills, tokens)
    assert len(calls) == 4


def _cut(path, other):
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def _garble(path, other):
    path.write_text("notes of mine")


def _swap(path, other):
    shutil.copy(other, path)


def _forget(path, other):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (_cut, "cannot be read as a prefill"),
        (_flip, "is damaged"),
        (_garble, "cannot be read as a prefill"),
        (_swap, "is the prefill of another model or text"),
        (_forget, "is the prefill of another model or text"),
    ],
)
def test_a_file_that_does_not_fit_is_made_again(prefills, tokens, calls, caplog, fault, told):
    want = get(prefills, tokens)
    (path,) = prefills.folder.iterdir()
    get(prefills, tokens[:-1])
    (other,) = set(prefills.folder.iterdir()) - {path}
    fault(path, other)
    caplog.clear()
    assert_same(get(prefills, tokens), want)
    (record,) = caplog.records
    assert told in record.message and record.message.endswith("it is made again")
    assert len(calls) == 3
    get(prefills, tokens)
    assert len(calls) == 3 and len(caplog.records) == 1


def test_a_write_that_fails_leaves_no_file(prefills, tokens, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(InputError, match="No space left on device; nothing was changed"):
        get(prefills, tokens)
    assert list(prefills.folder.iterdir()) == []


def test_methods_start_from_rounded_rows_and_the_reference_from_exact_ones(model, tokens):
    prefill = make_prefill(model, tokens[:LENGTH], tokens[LENGTH:], 7)
    document = prefill.document
    assert document.keys[0].dtype == model.kv_dtype != model.dtype
    again = model.prefill(tokens[:LENGTH], 7)
    for mine, its in zip(document.values, again.values, strict=True):
        np.testing.assert_array_equal(*map(model.backend.to_numpy, (mine, its)))
    assert document.make_cache == model.make_cache


def test_checkpoints_are_told_apart_by_their_files(tmp_path):
    first = write_checkpoint(tmp_path / "a", ARCHITECTURES["qwen3"])
    shutil.copytree(first, tmp_path / "copy")
    assert checkpoint_code(str(first)) == checkpoint_code(str(tmp_path / "copy"))
    (tmp_path / "copy" / "xkv-profile.json").write_text("{}")
    assert checkpoint_code(str(first)) == checkpoint_code(str(tmp_path / "copy"))
    _flip(next((tmp_path / "copy").glob("*.safetensors")), None)
    assert checkpoint_code(str(first)) != checkpoint_code(str(tmp_path / "copy"))
    assert checkpoint_code("nobody/nowhere") != checkpoint_code("nobody/elsewhere")
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        checkpoint_code(str(tmp_path / "copy"))
