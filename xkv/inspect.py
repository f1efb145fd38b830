"""``python -m xkv.inspect``: what a prompt's cache looks like, and what compression makes of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from xkv.calibrate import choose_profile, prompt_tokens, read_prompt
from xkv.command_line import size_text, user_errors
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation import load_language_model
from xkv.evaluation.methods.lowrank import compressed_cache
from xkv.evaluation.methods.method import Document
from xkv.evaluation.model import LanguageModel
from xkv.flags import add_compression_flags, config_from
from xkv.lowrank_cache import LowRankCache
from xkv.plots import CAPTIONS, new_figure, write_plots
from xkv.shares import JointSpectrum
from xkv.similarity import cka
from xkv.tiny import CHECKPOINT_DIR

TENSORS = ("keys", "values")


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.inspect",
        description="Plot a prompt's cache: singular spectra, similarity of layers, the error of "
        "each layer once it is compressed, and the bits that the latents are held in.",
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--prompt",
        "-p",
        help="text file, or text, to look at ('-' reads stdin); a built-in text if left out",
    )
    parser.add_argument(
        "--backend", choices=["mlx", "torch"], default="mlx", help="framework (default: mlx)"
    )
    parser.add_argument(
        "--out",
        default="xkv-inspection",
        help="folder of the plots and numbers (default: xkv-inspection)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    add_compression_flags(parser, has_kernels=False)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Do what the parsed arguments ask.

    Raises:
        InputError: If they cannot be met.
    """
    config = config_from(args, args.model is None)
    if config is None:
        raise InputError("--group-size 0 runs the full cache, which has nothing to inspect")
    new_figure(1, 1)  # a missing matplotlib is told before minutes of work
    text = read_prompt(args.prompt)
    name, trust = args.model or str(CHECKPOINT_DIR), args.trust_remote_code
    group_size = vars(args).get("group_size")
    profile = choose_profile(args.grouping, group_size, name, args.backend, trust_remote_code=trust)
    model = load_language_model(args.backend, name, trust_remote_code=trust)
    if profile is not None:
        config = profile.apply(config, model.identity)
    report = inspect(model, text, config)
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "inspect.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    names = ["inspect.json", *write_plots(folder, report)]
    print("\n".join(_lines(report)))
    print(f"{folder}: {', '.join(names)}", file=sys.stderr)


def inspect(model: LanguageModel, text: str, config: XKVConfig) -> dict[str, Any]:
    """Everything that is plotted, ready for JSON.

    Args:
        model: The model.
        text: The prompt.
        config: How it is compressed; only rows that are compressed are looked at.

    Raises:
        InputError: If the prompt is too short, or its rows hold NaN or infinity.
    """
    document = model.prefill(prompt_tokens(model, text), seed=0)
    n_layers = len(document.keys)
    plain = {
        tensor: [document.plain_rows(tensor, layer) for layer in range(n_layers)]
        for tensor in TENSORS
    }
    cache = compressed_cache(document, config)
    start = cache.groups[0].start
    rows = slice(start, start + cache.groups[0].layers[0].n_segment)
    plain = {tensor: [layer[rows] for layer in layers] for tensor, layers in plain.items()}
    dense = [layer for layer in range(n_layers) if layer not in cache.layers]
    held = cache.held_bytes()
    held += sum(document.keys[i].nbytes + document.values[i].nbytes for i in dense)
    return {
        "model": str(model.identity),
        "backend": document.backend.name,
        "n_tokens": document.n_tokens,
        "n_compressed": rows.stop - rows.start,
        "config": asdict(config),
        "groups": [list(group) for group in cache.indices],
        "dense_bytes": document.dense_bytes,
        "held_bytes": held,
        "similarity": {
            tensor: cka(document.backend, plain[tensor]).round(6).tolist() for tensor in TENSORS
        },
        "spectra": [
            _spectrum(document, cache, number, tensor, plain[tensor])
            for number in range(len(cache.groups))
            for tensor in TENSORS
        ],
        "errors": {tensor: _errors(document, cache, tensor, rows) for tensor in TENSORS},
        "bands": band_plan(cache),
        "captions": CAPTIONS,
    }


def _spectrum(
    document: Document, cache: LowRankCache, number: int, tensor: str, plain: Sequence[Any]
) -> dict[str, Any]:
    """One group's layers side by side, and each alone."""
    layers = cache.indices[number]
    joint = JointSpectrum.of(document.backend, [plain[i] for i in layers])
    single = [JointSpectrum.of(document.backend, [plain[i]]) for i in layers]
    factors = getattr(cache.groups[number], tensor)
    n_rows, energy = plain[0].shape[0], joint.energies.sum()
    left = np.array([x.left_out() ** 2 * x.energies.sum() for x in single]).sum(0)
    return {
        "group": number,
        "layers": list(layers),
        "tensor": tensor,
        "rank": factors.rank,
        "joint": _short(joint.singular_values),
        "single": [_short(x.singular_values) for x in single],
        "joint_curve": _curve(joint.left_out(), n_rows, joint.width),
        "single_curve": _curve(np.sqrt(left / max(energy, 1e-30)), n_rows, single[0].width),
    }


def _curve(error: np.ndarray, n_rows: int, width: int) -> dict[str, list[float]]:
    """Relative error by rank, and what such factors take."""
    share = np.arange(len(error)) * (n_rows + width) / (n_rows * width)
    return {"share_of_dense": _short(share), "error": _short(error)}


def _short(numbers: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in numbers]


def _errors(
    document: Document, cache: LowRankCache, tensor: str, rows: slice
) -> list[float | None]:
    """Relative error of each layer's compressed rows; None for a layer that stays dense."""
    backend = document.backend
    found: list[float | None] = []
    for layer, exact in enumerate(getattr(document, tensor)):
        if layer not in cache.layers:
            found.append(None)
            continue
        approximate = cache.layers[layer].dense()[TENSORS.index(tensor)]
        got, want = (
            backend.to_numpy(x[..., rows, :]).astype(np.float64) for x in (approximate, exact)
        )
        norm = np.linalg.norm(want)
        found.append(float(np.linalg.norm(got - want) / norm) if norm else 0.0)
    return found


def band_plan(cache: LowRankCache) -> list[dict[str, Any]]:
    """The bits of every latent and basis of a compressed cache, band by band.

    Returns:
        For each band its ``group``, ``tensor`` ("keys" or "values"), ``first_column``,
        ``n_columns``, ``latent_bits`` and ``basis_bits``.
    """
    bands = []
    for number, group in enumerate(cache.groups):
        for tensor in TENSORS:
            factors, first = getattr(group, tensor), 0
            for width, latent_bits, basis_bits in factors.parts():
                bands.append(
                    {
                        "group": number,
                        "tensor": tensor,
                        "first_column": first,
                        "n_columns": width,
                        "latent_bits": latent_bits,
                        "basis_bits": basis_bits,
                    }
                )
                first += width
    return bands


def _lines(report: dict[str, Any]) -> list[str]:
    """The numbers for people, as Markdown."""
    dense, held = report["dense_bytes"], report["held_bytes"]
    lines = [
        f"{report['model']}, {report['n_tokens']} tokens: {size_text(dense)} dense, "
        f"{size_text(held)} held ({dense / held:.2f} x)",
        "",
        "| layer | group | error of keys | error of values |",
        "| ---: | ---: | ---: | ---: |",
    ]
    group_of = {layer: str(i) for i, group in enumerate(report["groups"]) for layer in group}
    for layer, pair in enumerate(zip(*report["errors"].values(), strict=True)):
        keys, values = ("dense" if x is None else f"{x:.4f}" for x in pair)
        lines.append(f"| {layer} | {group_of.get(layer, '–')} | {keys} | {values} |")
    for name, caption in report["captions"].items():
        lines += ["", f"**{name}.png**: {caption}"]
    return lines


if __name__ == "__main__":
    main()
