"""Error of attention against bytes held: xKV beside the paper's form, one layer alone and mlx-lm's.

    python scripts/bench_fidelity.py

Caches of the bundled model over long documents, and synthetic groups of 4 layers with 4,096 joint
columns, whose singular values fall in three ways. Every method compresses the same caches, all
bytes counted, and is asked for the attention of queries that look for single tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import xkv
from xkv.cli.record import make_record, typed_command, write_record
from xkv.cli.terminal import user_errors
from xkv.evaluation.methods import parse_method
from xkv.ops.backend import Backend
from xkv.planning.document import Document

# imported as a module, the scripts' folder is not where imports are looked for
sys.path.insert(0, str(Path(__file__).parent))

from fidelity_documents import SPECTRA, bundled_documents, synthetic_document
from fidelity_points import HEAD, PAPER, Point, plot, table_row, verdicts

LONG = 16384
"""Above so many tokens only the ratios that the verdicts need are measured."""


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--backend", choices=["mlx", "torch"], default="torch")
    parser.add_argument("--families", nargs="+", default=["bundled", *SPECTRA])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192], help="synthetic")
    parser.add_argument("--documents", type=int, default=6, help="of the bundled model, 4k each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw error against ratio")
    return parser


def errors(document: Document, layers: Sequence[Any]) -> tuple[float, float]:
    """Relative errors of attention output and of scores, means over layers."""
    backend, found = document.backend, []
    xp = backend.xp
    for index, layer in enumerate(layers):
        queries = document.widen(document.queries[index])
        exact = (document.widen(document.keys[index]), document.widen(document.values[index]))
        given = (layer.prefix_keys, layer.prefix_values)
        outputs, scores = [], []
        for keys, values in (exact, given):
            outputs.append(backend.attention(queries, keys, values, document.scale, None))
            grouped = xp.reshape(queries, (1, keys.shape[1], -1, queries.shape[-1]))
            products = grouped @ xp.matrix_transpose(keys) * document.scale
            scores.append(products - xp.mean(products, axis=-1, keepdims=True))
        found.append([_relative(backend, *pair) for pair in (outputs, scores)])
    output, logit = np.mean(found, axis=0)
    return float(output), float(logit)


def _relative(backend: Backend, want: Any, got: Any) -> float:
    xp = backend.xp
    difference, size = (float(xp.sum(x * x)) for x in (got - want, want))
    return (difference / size) ** 0.5


def measure(documents: Sequence[Document], family: str, group: str, is_long: bool) -> list[Point]:
    """All methods on the same caches."""
    four_bits = (
        documents[0].dense_bytes / parse_method("quantized").compress(documents[0], None).held_bytes
    )
    ratios = [8.0, 16.0] if is_long else [2.0, 4.0, 8.0, 16.0, 32.0]
    asked: list[tuple[str, float | None]] = [
        *((f"quantized:bits={bits}", None) for bits in (8, 4, 2)),
        *((f"xkv:{group}", ratio) for ratio in (round(four_bits, 3), *ratios)),
        *((f"xkv:{group},{PAPER}", ratio) for ratio in ratios if ratio < 32),
        *((f"svd:{PAPER}", ratio) for ratio in ratios if ratio < 16),
    ]
    points = []
    for label, ratio in asked:
        method, found = parse_method(label), []
        for document in documents:
            began = time.perf_counter()
            try:
                compressed = method.compress(document, ratio)
            except xkv.InputError as error:
                print(f"  {label} at {ratio:g} x: {error}", flush=True)
                n_tokens = document.n_tokens
                points.append(Point(family, n_tokens, label, 0.0, ratio, problem=str(error)))
                break
            seconds = time.perf_counter() - began
            layers = compressed.start()
            held = document.dense_bytes / compressed.held_bytes
            found.append((held, *errors(document, layers), seconds))
            del compressed, layers
        if len(found) == len(documents):
            held, output, logit, seconds = np.mean(found, axis=0).tolist()
            n_tokens = documents[0].n_tokens
            points.append(Point(family, n_tokens, label, held, ratio, output, logit, seconds))
            print(table_row(points[-1]), flush=True)
    return points


def main() -> None:
    args = setup_arg_parser().parse_args()
    backend = xkv.load_backend(
        args.backend, **({"kernels": "off"} if args.backend == "mlx" else {})
    )
    points: list[Point] = []
    print(HEAD, flush=True)
    if "bundled" in args.families:
        documents = list(bundled_documents(args.backend, args.documents))
        points += measure(documents, "bundled", "group_size=8", False)
    for n_tokens in args.lengths:
        for family in [name for name in args.families if name in SPECTRA]:
            documents = [synthetic_document(backend, family, n_tokens)]
            points += measure(documents, family, "group_size=4", n_tokens > LONG)
            del documents
    measured = [point for point in points if point.problem is None]
    print("\n" + "\n".join(verdicts(measured)))
    if args.plot:
        plot(measured, args.plot)
    if args.json:
        with user_errors():
            keep(args, backend, points)


def keep(args: argparse.Namespace, backend: Backend, points: Sequence[Point]) -> None:
    """Write a record."""
    record = make_record(
        "fidelity",
        [point.row() for point in points],
        command=typed_command("python scripts/bench_fidelity.py"),
        model="bundled, and synthetic groups of 4 layers with 4,096 joint columns",
        backend=args.backend,
        settings={"device": backend.device_name, "documents": args.documents},
    )
    write_record(args.json, record)


if __name__ == "__main__":
    main()
