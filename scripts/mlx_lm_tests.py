"""Run mlx-lm's own batching tests on the bundled model with compressed caches.

    git clone --depth 1 --branch v0.32.0 https://github.com/ml-explore/mlx-lm
    python -m scripts.mlx_lm_tests mlx-lm/tests/test_generate.py --compression 8

The file is read as it is, but that the model it loads is ours, enabled. Left out are tests of
``max_kv_size``, which xKV refuses. One that takes the model's ``make_cache`` away
comes last.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import unittest
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils

import xkv
from xkv.tiny import CHECKPOINT_DIR

LEFT_OUT = ("max_kv_size_creates", "max_kv_size_limits")
"""In the names of tests."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="mlx-lm's tests/test_generate.py")
    parser.add_argument("--compression", type=float, default=8.0, help="default: 8")
    parser.add_argument("-k", default="batch", help="in the tests' names (default: batch)")
    return parser


def main() -> None:
    """Load the file, and run its tests."""
    args = setup_arg_parser().parse_args()

    def load(*_: Any, **__: Any) -> Any:
        model, tokenizer = original(str(CHECKPOINT_DIR))
        model.set_dtype(mx.float32)
        xkv.enable(model, compression=args.compression)
        return model, tokenizer

    original, mlx_lm.utils.load = mlx_lm.utils.load, load
    spec = importlib.util.spec_from_file_location("mlx_lm_tests", args.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = []
    for group in unittest.defaultTestLoader.loadTestsFromModule(module):
        assert isinstance(group, unittest.TestSuite)
        for test in group:
            name = test.id().rpartition(".")[2]
            if args.k in name and not any(part in name for part in LEFT_OUT):
                chosen.append(test)
    tests = unittest.TestSuite(sorted(chosen, key=lambda test: "sliding_window" in test.id()))
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    sys.exit(not (result.wasSuccessful() and result.testsRun))


if __name__ == "__main__":
    main()
