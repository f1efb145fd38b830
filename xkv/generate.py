"""``python -m xkv.generate``: answer a prompt out of a compressed KV cache."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields

from tqdm import tqdm

from xkv.config import Rank, XKVConfig
from xkv.engine import Generation, Sampling, load_engine
from xkv.errors import InputError
from xkv.layer_cache import DECODE_TOKENS
from xkv.tiny import CHECKPOINT_DIR, SELECTION, make_document

BUILT_IN_SEED = 2024
BUILT_IN_TOKENS = 3500


def setup_arg_parser() -> argparse.ArgumentParser:
    """Flags that mlx-lm has keep its names and meanings."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.generate",
        description="Answer a prompt out of a compressed KV cache. Without arguments: the bundled "
        "model, a built-in long document and a question about it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", help="model directory or Hugging Face repository; the bundled model if left out"
    )
    parser.add_argument(
        "--prompt", "-p", help="message to answer ('-' reads stdin); a built-in one if left out"
    )
    parser.add_argument("--system-prompt", help="system message for the chat template")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="take the prompt as it is"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    parser.add_argument("--backend", choices=["mlx", "torch"], default="mlx", help="framework")
    parser.add_argument(
        "--kernels", choices=["auto", "on", "off"], default="auto", help="use device kernels"
    )
    parser.add_argument(
        "--compare", action="store_true", help="run the full cache beside it in the same process"
    )
    cache = parser.add_argument_group("compression")
    cache.add_argument(
        "--compression",
        type=float,
        help="target ratio of dense bytes to bytes held; 4 if no ranks are given",
    )
    cache.add_argument(
        "--group-size",
        type=int,
        default=XKVConfig.group_size,
        help="layers that share a latent; 0 runs with the full cache",
    )
    cache.add_argument("--rank-k", type=_rank, help="rank of the keys: a number or 'full'")
    cache.add_argument("--rank-v", type=_rank, help="rank of the values: a number or 'full'")
    for name, text in (
        ("sinks", "first tokens that stay dense"),
        ("window", "last tokens of the prompt that stay dense"),
        ("budget", "tokens a decode step reconstructs in selective attention"),
        ("chunk-size", "tokens that are selected together"),
        ("landmark-bits", "bits of the chunks' summary keys: 4, 8 or 16"),
    ):
        default = getattr(XKVConfig, name.replace("-", "_"))
        if name.replace("-", "_") in SELECTION:
            text += f" (default: {default}; bundled model: {SELECTION[name.replace('-', '_')]})"
            default = argparse.SUPPRESS
        cache.add_argument(f"--{name}", type=int, default=default, help=text)
    cache.add_argument(
        "--attention",
        choices=["auto", "dense", "selective"],
        default=XKVConfig.attention,
        help="decode attention over every compressed row, or over the selected ones",
    )
    sampling = parser.add_argument_group("sampling")
    for field in fields(Sampling):
        if field.name == "seed":
            sampling.add_argument("--seed", type=int, help="PRNG seed")
            continue
        names = ["--" + field.name.replace("_", "-")] + ["-m"] * (field.name == "max_tokens")
        kind = int if isinstance(field.default, int) else float
        sampling.add_argument(*names, type=kind, default=field.default, help="as in mlx-lm")
    parser.add_argument(
        "--prefill-step-size", type=int, default=2048, help="prompt tokens processed at a time"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    args = setup_arg_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    """Do what the parsed arguments ask.

    Raises:
        InputError: If they cannot be met.
    """
    config = config_from(args)
    sampling = _sampling_from(args)
    prompt = _read_prompt(args)
    engine = load_engine(
        args.backend,
        args.model or str(CHECKPOINT_DIR),
        trust_remote_code=args.trust_remote_code,
        kernels=args.kernels,
    )
    tokens = engine.encode(
        prompt, system_prompt=args.system_prompt, use_chat_template=not args.ignore_chat_template
    )

    def answer(config: XKVConfig | None, title: str) -> Generation:
        if args.compare:
            print(f"--- {title}")
        with _ProgressBars() as bars:
            result = engine.generate(
                tokens,
                config,
                sampling,
                prefill_step_size=args.prefill_step_size,
                on_text=bars.write,
                on_progress=bars.update,
            )
        print()
        print(report(result))
        return result

    mine = answer(config, "full cache" if config is None else "xKV")
    if args.compare and config is not None:
        full = answer(None, "full cache")
        same = "the same" if mine.tokens == full.tokens else "different"
        ratio = full.allocated_bytes / mine.allocated_bytes
        print(f"--- answers are {same}; xKV holds {ratio:.2f} x less memory")


def config_from(args: argparse.Namespace) -> XKVConfig | None:
    """The configuration that the flags ask for; None with ``--group-size 0``."""
    chosen = {**({} if args.model else SELECTION), **vars(args)}
    names = {field.name for field in fields(XKVConfig)} & set(chosen)
    if args.group_size == 0:
        given = [
            f"--{x.replace('_', '-')}" for x in ("compression", "rank_k", "rank_v") if vars(args)[x]
        ]
        if given:
            raise InputError(
                f"--group-size 0 runs the full cache, which {', '.join(given)} contradicts"
            )
        return None
    return XKVConfig(**{name: chosen[name] for name in names})


def report(result: Generation) -> str:
    """The last lines of a run, like mlx-lm's, with the cache's memory."""
    prefill_tps = result.n_prompt / max(result.prefill_seconds, 1e-9)
    lines = [
        "=" * 10,
        f"Prompt: {result.n_prompt} tokens, {prefill_tps:.3f} tokens-per-sec",
        f"Generation: {len(result.tokens)} tokens, {result.decode_tps:.3f} tokens-per-sec",
    ]
    if result.detail is not None:
        lines.append(f"Factorization: {result.factorize_seconds:.3f} s ({result.detail})")
    lines.append(f"Peak memory: {_size(result.peak_bytes)}")
    ratio = result.dense_bytes / max(result.allocated_bytes, 1)
    lines.append(
        f"KV cache: {_size(result.dense_bytes)} dense, {_size(result.allocated_bytes)} held "
        f"({ratio:.2f} x), {_size(result.held_bytes)} by the sizes of its arrays"
    )
    if result.notice:
        lines.append(f"Note: {result.notice}")
    return "\n".join(lines)


class _ProgressBars:
    """One bar on stderr for each phase, closed before the answer begins."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: tqdm | None = None

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            unit = "token" if phase == "prefill" else "factor"
            self._bar = tqdm(
                total=total, desc=phase, unit=unit, file=sys.stderr, leave=False, delay=0.5
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def write(self, text: str) -> None:
        self.close()
        print(text, end="", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _ProgressBars:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rank(text: str) -> Rank:
    if text == "full":
        return "full"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'full'") from None


def _sampling_from(args: argparse.Namespace) -> Sampling:
    sampling = Sampling(**{field.name: vars(args)[field.name] for field in fields(Sampling)})
    if sampling.max_tokens < 1:
        raise InputError(f"--max-tokens {sampling.max_tokens} must be at least 1")
    if args.prefill_step_size <= DECODE_TOKENS:
        raise InputError(
            f"--prefill-step-size {args.prefill_step_size} must be above {DECODE_TOKENS}: "
            "smaller calls count as decoding"
        )
    return sampling


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt == "-":
        return sys.stdin.read()
    if args.prompt is not None:
        return args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    document = make_document(BUILT_IN_SEED, BUILT_IN_TOKENS)
    fact = document.facts[len(document.facts) // 3]
    print(
        f"The built-in document has about {BUILT_IN_TOKENS} tokens; it begins:\n"
        f"  {document.text[:140].rsplit(' ', 1)[0]} ...\n"
        f"Question: {fact.question}"
    )
    return f"{document.text} {fact.question}"


def _size(n_bytes: int) -> str:
    """Bytes for people, in decimal units like mlx-lm's."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.3f} GB"
    return f"{n_bytes / 1e6:.3f} MB"


if __name__ == "__main__":
    main()
