"""The page of ``python -m xkv.inspect``: what it says, that nothing breaks out of it, and that a
browser shows it."""

from __future__ import annotations

import copy
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tests.evaluation.browser import NAMES, Browser, find_browser
from xkv import InputError, XKVConfig
from xkv.checks.page import write_page
from xkv.evaluation import inspection
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document

CONFIG = XKVConfig(groups=((0, 1, 2), (3, 4, 5, 6)), rank_k=40, rank_v=56, window=24)
NASTY = "\"'><script>alert(1)</script><img src=x onerror=alert(2)></code></title>&amp; {{ 7 * 7 }}"
VOID = {"img", "meta", "br", "link"}


@pytest.fixture(scope="module")
def report():
    model = load_language_model("torch", str(CHECKPOINT_DIR))
    text = make_document(seed=4, n_tokens=400).text
    return inspection.inspect(model, text, CONFIG, 3) | {
        "name": "a model of " + "x" * 99,
        "command": "x" * 500,
    }


class Seen(HTMLParser):
    """Elements in order, and the texts inside each kind."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder / write_page(folder, report)


@pytest.fixture(scope="module")
def spoilt_page(report, tmp_path_factory):
    """With texts that would like to be markup."""
    spoilt = copy.deepcopy(report) | dict.fromkeys(("name", "command", "prompt", "model"), NASTY)
    spoilt["versions"] = {NASTY: NASTY}
    spoilt["working_set"]["tokens"][1] = NASTY
    folder = tmp_path_factory.mktemp("spoilt")
    return folder / write_page(folder, spoilt)


def test_page_is_whole_and_accessible(report, page):
    source = page.read_text(encoding="utf-8")
    seen = Seen(source)
    assert len(source) < 3_000_000
    assert seen.all_of("html") == [{"lang": "en"}] and "a model" in seen.texts["title"][0]
    levels = [int(tag[1]) for tag, _ in seen.elements if tag[0] == "h" and tag[1:].isdigit()]
    assert levels == [1, 2, 2, 2, 2, 2]
    pictures = seen.all_of("img")
    assert len(pictures) == len(report["captions"]) == 6
    assert len({picture["alt"] for picture in pictures} - {"", None}) == 6
    assert all(picture["src"].startswith("data:image/png;base64,iVBOR") for picture in pictures)
    assert all(x.get("scope") in ("row", "col") for x in seen.all_of("th"))
    assert len(seen.texts["caption"]) == len(seen.all_of("table")) - 1 == 4
    # nothing from elsewhere, and nothing that runs
    outside = [x for _, attributes in seen.elements for x in ("href", "srcset") if x in attributes]
    assert outside == [] and not seen.all_of("script") and not seen.all_of("link")
    assert "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source


def test_page_says_the_numbers(report, page):
    seen = Seen(page.read_text(encoding="utf-8"))
    rows = [" ".join(text.split()) for text in seen.texts["tr"]]
    ratio = report["dense_bytes"] / report["held_bytes"]
    assert any(row.startswith(f"Compression held{ratio:.2f} x") for row in rows)
    assert "Compression askednone: ranks were given" in rows
    assert "Layers that share a latent0-2, 3-6" in rows
    assert "3-6values5656 × 16" in rows
    keys, values = (report["errors"][tensor][4] for tensor in inspection.TENSORS)
    assert f"41{keys:.4f}{values:.4f}" in rows and "7–densedense" in rows
    story = report["working_set"]
    head = story["layers"][1]["heads"][0]
    shares = [len({*now} & {*before}) / len(now) for before, now in pairwise(head)]
    repeats = f"{sum(shares) / len(shares):.1%}"
    assert f"{story['layers'][1]['layer']}0{len(head[0])}.0{repeats}" in rows
    assert [row[0] for row in rows[-len(story["tokens"]) :]] == ["1", "2", "3", "4", "5"]


def test_nothing_breaks_out(page, spoilt_page):
    source, clean = (x.read_text(encoding="utf-8") for x in (spoilt_page, page))
    seen, plain = Seen(source), Seen(clean)
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in plain.elements]
    assert [list(x) for _, x in seen.elements] == [list(x) for _, x in plain.elements]
    assert "<script" not in source
    texts = "".join(seen.texts["html"])
    assert texts.count(NASTY) == 8 and "49" not in seen.texts["h1"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "exact"}, "Every stored row is attended to"),
        ({"window": 128}, "too short for a working set"),
    ],
)
def test_without_a_working_set_a_sentence_says_why(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr("xkv.checks.page._png", lambda name, report: "")
    model = load_language_model("torch", str(CHECKPOINT_DIR))
    text = make_document(seed=4, n_tokens=380).text
    config = XKVConfig(**{"group_size": 8, "rank_k": 40, "rank_v": 56, "window": 24} | options)
    report = inspection.inspect(model, text, config) | {"name": "a model", "command": ""}
    assert list(report["captions"]) == ["spectra", "similarity", "errors", "bands"]
    seen = Seen((tmp_path / write_page(tmp_path, report)).read_text(encoding="utf-8"))
    assert words in seen.texts["main"][0] and len(seen.all_of("img")) == 4


def test_a_page_that_cannot_be_written_is_one_sentence(report, tmp_path, monkeypatch):
    monkeypatch.setattr("xkv.checks.page._png", lambda name, report: "")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*index.html: Is a directory"):
        write_page(tmp_path, report)


@pytest.fixture
def browser(tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip(f"the page is not opened: there is none of {', '.join(NAMES)} here")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


def test_browser_shows_the_page(spoilt_page, browser):
    browser.open(spoilt_page.as_uri())
    sizes = browser.evaluate("[...document.images].map(x => x.naturalWidth)")
    assert len(sizes) == 6 and min(sizes) > 400
    headings = browser.evaluate("[...document.querySelectorAll('h1, h2')].map(x => x.innerText)")
    assert headings[0].endswith(NASTY) and headings[-1] == "The working set over time"
    assert browser.evaluate("document.scripts.length") == 0
    troubles = "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
    assert browser.told(*troubles) == []
    requests = [x["request"]["url"] for x in browser.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [spoilt_page.as_uri()]


def test_browser_fits_the_page_to_a_phone_and_to_the_dark(page, browser):
    phone = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.call("Emulation.setDeviceMetricsOverride", **phone)
    browser.open(page.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
    colors = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", features=features)
        style = "getComputedStyle(document.body)"
        colors.append(browser.evaluate(f"[{style}.backgroundColor, {style}.color]"))
    assert colors[0] == ["rgb(255, 255, 255)", "rgb(28, 30, 33)"]
    assert colors[1] == ["rgb(21, 23, 27)", "rgb(228, 230, 234)"]
