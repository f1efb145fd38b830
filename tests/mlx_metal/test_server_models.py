"""Which models a request may name, and what else of it reaches beyond its text."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.server import ModelDescription

from tests.serving import ANSWER, CHAT, MESSAGES, Server, float32_model, text_of
from xkv.backends.mlx_metal.server.errors import RequestError
from xkv.backends.mlx_metal.server.guard import AllowedModels
from xkv.tiny import CHECKPOINT_DIR


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float32_model(tmp_path_factory.mktemp("model") / "float32")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def server(log: Path, other_model: Path) -> Iterator[Server]:
    flags = ["--allow-models", str(other_model), "some/name"]
    with log.open("wb") as file, Server(*flags, log=file) as running:
        yield running


def message_of(answer: Any) -> str:
    return answer["error"]["message"]


def test_models_are_listed_as_they_are_allowed(server: Server, other_model: Path) -> None:
    listed = [x.id for x in server.client.models.list().data]
    assert listed == [str(CHECKPOINT_DIR.resolve()), str(other_model), "some/name"]
    for name in listed:
        assert server.client.models.retrieve(name).id == name
    for name in ("some", "/etc", "../../etc"):
        status, answer = server.request(f"/v1/models/{name}")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_allowed_models_are_loaded(server: Server, log: Path, other_model: Path) -> None:
    own = str(CHECKPOINT_DIR)
    for name, n_loaded in ((own, 1), (str(other_model), 2), ("default_model", 3), (own, 3)):
        status, answer = server.request(CHAT, {"messages": MESSAGES, "model": name})
        assert (status, text_of(answer)) == (200, ANSWER), answer
        assert log.read_text().count("layer 0-7: compressed") == n_loaded


def described(model: str, draft: str = "default_model", adapter: str | None = None) -> Any:
    return ModelDescription(model, draft, adapter)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (described("default_model"), described("default_model")),
        (described("a/model"), described("default_model")),
        (described("a/model", adapter="own"), described("default_model", adapter="own")),
        (described("default_model", "a/draft"), described("default_model", "a/draft")),
        # mlx-lm would leave these adapters out
        (described("default_model", adapter="b"), described("a/model", adapter="b")),
        (described("b"), described("b")),
        (described("b", "b", "b"), described("b", "b", "b")),
        (described("c"), "model 'c' is"),
        (described("a/draft"), "model 'a/draft' is"),
        (described("a/model", "a/model"), "draft_model 'a/model' is"),
        (described("a/model", adapter="a/model"), "adapters 'a/model' is"),
        (described("a" * 10**6), f"model '{'a' * 200}' is"),
    ],
)
def test_names_are_compared(wanted: Any, chosen: Any) -> None:
    allowed = AllowedModels("a/model", "own", "a/draft", ("b",))
    if not isinstance(chosen, str):
        assert allowed.chosen(wanted) == chosen
        return
    with pytest.raises(RequestError) as raised:
        allowed.chosen(wanted)
    assert str(raised.value).startswith(chosen)


@pytest.mark.parametrize("is_object", [False, True])
@pytest.mark.parametrize("kind", ["image_url", "input_image", "image"])
def test_images_are_not_fetched(server: Server, kind: str, is_object: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        image = {"url": url} if is_object else url
        field = "image" if kind == "image" else "image_url"
        parts = [{"type": "text", "text": "Look."}, {"type": kind, field: image}]
        status, answer = server.request(CHAT, {"messages": [{"role": "user", "content": parts}]})
        assert status == 400
        assert message_of(answer) == "an image must be a data: URL: the server fetches nothing"
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"),
        ("padding", "max_length"),
        ("max_length", 10**9),
        ("tokenize", False),
        ("return_dict", True),
        ("tokenizer_kwargs", {}),
    ],
)
def test_template_variables_are_no_options(server: Server, name: str, value: Any) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: value}}
    status, answer = server.request(CHAT, body)
    assert status == 400
    assert message_of(answer) == (
        f"chat_template_kwargs must not have {name}: it is no template's variable"
    )
