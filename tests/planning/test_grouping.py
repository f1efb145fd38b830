from __future__ import annotations

import pytest

from xkv import InputError, XKVConfig, make_groups


def test_make_groups_strides_with_a_shorter_last_group():
    assert make_groups(XKVConfig(group_size=4), 10) == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))


def test_make_groups_first_and_last_layer():
    config = XKVConfig(group_size=3, first_layer=1, last_layer=5)
    assert make_groups(config, 8) == ((1, 2, 3), (4, 5))


def test_make_groups_takes_explicit_lists():
    assert make_groups(XKVConfig(groups=[[0, 3], [1, 2]]), 4) == ((0, 3), (1, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": ((0, 1), (1, 2))}, "layer 1 twice"),
        ({"groups": ((0, 9),)}, "layer 9"),
        ({"groups": ((0,), ())}, "empty"),
        ({"groups": ()}, "empty"),
        ({"first_layer": 4}, "layers 4 to 3"),
        ({"last_layer": 4}, "layers 0 to 4"),
    ],
)
def test_make_groups_refuses(options: dict, words: str):
    with pytest.raises(InputError, match=words):
        make_groups(XKVConfig(**options), 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"rank_k": 8}, "rank_v is missing"),
        ({"rank_k": 0, "rank_v": 4}, "rank_k=0"),
        ({"rank_k": "half", "rank_v": 4}, "'full'"),
        ({"rank_k": 8, "rank_v": 8, "compression": 4.0}, "exclude each other"),
        ({"compression": 1.0}, "above 1"),
        ({"compression": float("nan")}, "above 1"),
        ({"window": -1}, "window=-1"),
        ({"budget": 20}, "above the sinks and the window, 4 \\+ 16"),
        ({"kept_share": 1.0}, "at least 0 and below 1"),
        ({"attention": "sparse"}, "auto or exact"),
    ],
)
def test_config_refuses(options: dict, words: str):
    with pytest.raises(InputError, match=words):
        XKVConfig(**options)


def test_importing_xkv_imports_no_framework():
    import subprocess
    import sys

    code = "import sys, xkv; print({'mlx', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_backend_is_refused_by_name():
    from xkv import load_backend

    with pytest.raises(InputError, match="'jax' is unknown"):
        load_backend("jax")
