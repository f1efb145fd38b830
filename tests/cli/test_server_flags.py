"""The server's own flags."""

from __future__ import annotations

import argparse

import pytest

from xkv.cli.server_flags import API_KEY, add_server_flags, byte_count, check_server_flags
from xkv.errors import InputError


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_server_flags(parser)
    args = parser.parse_args(flags)
    check_server_flags(args)
    return args


def test_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    assert parsed().api_key is None
    monkeypatch.setenv(API_KEY, "theirs")
    assert parsed().api_key == "theirs"
    assert parsed("--api-key", "mine").api_key == "mine"
    # as of a variable that is not set: nobody is let in by mistake
    monkeypatch.setenv(API_KEY, "")
    with pytest.raises(InputError, match="the API key must be printable ASCII"):
        parsed()


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-key", "a b"],
        ["--api-key", "clé"],
        ["--api-key", " a"],
        ["--api-key", "a\n"],
        ["--max-body-bytes", "0"],
        ["--max-connections", "0"],
        ["--request-timeout", "0"],
        ["--request-timeout", "nan"],
        ["--request-timeout", "inf"],
        ["--prompt-cache-dir", ""],
        ["--prompt-cache-dir", "d", "--prompt-cache-disk-bytes", "0"],
    ],
)
def test_flags_that_guard_nothing_are_refused(flags: list[str]) -> None:
    with pytest.raises(InputError, match=" must be "):
        parsed(*flags)


def test_bytes_on_disk_need_a_folder() -> None:
    assert parsed().prompt_cache_dir is None
    assert parsed("--prompt-cache-dir", "d").prompt_cache_disk_bytes == 10_000_000_000
    flags = ["--prompt-cache-dir", "d", "--prompt-cache-disk-bytes", "5"]
    assert parsed(*flags).prompt_cache_disk_bytes == 5
    with pytest.raises(InputError, match="--prompt-cache-disk-bytes needs a folder"):
        parsed("--prompt-cache-disk-bytes", "5")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("3k", 3000),
        ("500MB", 500_000_000),
        ("1.5 G", 1_500_000_000),
        ("2gb", 2_000_000_000),
        ("1TB", 10**12),
    ],
)
def test_bytes_have_units(text: str, count: int) -> None:
    assert byte_count(text) == count
    flags = ["--prompt-cache-dir", "d", "--prompt-cache-disk-bytes", text]
    assert parsed(*flags).prompt_cache_disk_bytes == count


@pytest.mark.parametrize("text", ["", "GB", "12X", "1 2", "5BB", "5KM", "nan", "inf"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of bytes"):
        byte_count(text)
