"""``python -m xkv.evaluate``: tasks over a compressed cache, other methods beside it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xkv.cli.first_use import calibrate_at_first_use
from xkv.cli.flags import add_calibration_flag, add_grouping_flag
from xkv.cli.record import make_record, typed_command
from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation import kl
from xkv.evaluation.hits import run as hits
from xkv.evaluation.hits.run import HITS, Hits
from xkv.evaluation.kl import KL, Divergence, read_texts
from xkv.evaluation.prefills import Prefills, checkpoint_code, dtype_name
from xkv.evaluation.report import report_divergence, report_hits, report_scores
from xkv.evaluation.run import Evaluation, Setting, make_settings
from xkv.evaluation.store import Store
from xkv.evaluation.tasks import TASKS, MakeSample
from xkv.evaluation.tasks.perplexity import PERPLEXITY, FileText
from xkv.evaluation.tasks.qa import TextQuestions
from xkv.planning.language_model import LanguageModel, load_language_model
from xkv.planning.layer_groups import choose_profile
from xkv.tiny import CHECKPOINT_DIR

METHODS = (
    "xkv",
    "xkv:group_size=4",
    "xkv:group_size=4,latent_bits=16,window=128",
    "xkv:group_size=8,latent_bits=16,window=128",
    "svd:latent_bits=16,window=128",
    "quantized:bits=8",
    "quantized:bits=4",
    "quantized:bits=2",
    "minicache",
    "rotating",
    "snapkv",
    "snapkv-query",
    "quest",
)
QUICK = {
    "tasks": ["needle", "multikey", "variables", PERPLEXITY],
    "lengths": [1024],
    "methods": ["xkv", "svd", "quantized:bits=4", "rotating"],
    "ratios": [2.0, 4.0],
    "samples": 12,
}
RATIOS = (2.0, 4.0, 8.0, 16.0)
CONTINUATION_TOKENS = 256
Part = Evaluation | Divergence | Hits
OTHER_TASKS = KL, HITS
"""Tasks that are no questions about a document alone."""
TEXT_TASKS = {PERPLEXITY, "qa"}
"""Tasks over one text of the user's own."""

FIRST_SEED = 1_000_000
"""Training draws negative seeds."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m xkv.evaluate",
        description="Score compressed caches on long-context tasks. A document is prefilled once; "
        "every method compresses it before it sees a question. A run that was ended goes on with "
        "the same command.",
    )

    def add(name: str, text: str, default: Any = None, **options: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        note = "" if default is None else f" (default: {shown})"
        parser.add_argument(name, default=default, help=text + note, **options)

    add("--model", "model directory or Hugging Face repository; the bundled model if left out")
    add("--backend", "framework", "mlx", choices=["mlx", "torch"])
    names = ", ".join(TASKS)
    add("--tasks", f"any of {names}; or {KL} or {HITS}", list(TASKS), nargs="+", metavar="TASK")
    add("--lengths", "tokens of the documents", [1024, 2048, 4096, 8192], nargs="+", type=int)
    add(
        "--methods",
        "methods beside the full cache, with options as in xkv:group_size=2,attention=exact "
        f"(default: {' '.join(METHODS)}; for {KL}: {' '.join(kl.METHODS)}; "
        f"for {HITS}: {' '.join(hits.METHODS)})",
        nargs="+",
        metavar="METHOD",
    )
    add(
        "--ratios",
        "dense bytes to bytes held, for methods whose size is free "
        f"(default: {_shown(RATIOS)}; for {KL}: {_shown(kl.RATIOS)}; "
        f"for {HITS}: {_shown(hits.RATIOS)})",
        nargs="+",
        type=float,
        metavar="RATIO",
    )
    add("--samples", "questions of each task at each length", 32, type=int)
    add("--seed", "seed of the first document", FIRST_SEED, type=int)
    add_grouping_flag(parser)
    add(
        "--text",
        f"text file for the tasks qa and ppl instead of the built-in texts; one or more for {KL}",
        nargs="+",
        metavar="FILE",
    )
    add("--questions", "file of questions over --text: JSON lines with question and answers")
    add(
        "--continuation",
        f"tokens after which {KL} compares next-token distributions",
        CONTINUATION_TOKENS,
        type=int,
    )
    add("--prefills", f"folder where {KL} keeps prefilled texts (default: in the folder --out)")
    add("--out", "folder of the results", "xkv-evaluation")
    parser.add_argument(
        "--quick", action="store_true", help="a few questions at one length, in minutes"
    )
    add_calibration_flag(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="for the tokenizer")
    return parser


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence on stderr and exit code 2."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    args.command = typed_command(parser.prog, argv)
    with user_errors():
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Do what the parsed arguments ask.

    Raises:
        InputError: If they cannot be met.
    """
    check_numbers(args)
    tasks = choose_tasks(args)
    # a misspelt method is told before a model is loaded
    make_settings(args.methods or [], args.ratios or [])
    model_name, trust = args.model or str(CHECKPOINT_DIR), args.trust_remote_code
    profile = choose_profile(args.grouping, None, model_name, args.backend, trust_remote_code=trust)
    model = load_language_model(args.backend, model_name, trust_remote_code=trust)
    grouping: dict[str, Any] = {}
    if profile is not None:
        config = profile.apply(XKVConfig(), model.identity)
        grouping = {"groups": config.groups}
    config = XKVConfig(**grouping)
    calibrate_at_first_use(
        lambda: model.subject(config), model.tokenizer, config, args.no_calibration
    )

    def settings(methods: Sequence[str], ratios: Sequence[float]) -> list[Setting]:
        return make_settings(args.methods or methods, args.ratios or ratios, grouping)

    parts: list[Part] = []
    if tasks:
        chosen = settings(METHODS, RATIOS)
        parts.append(Evaluation(model, tasks, args.lengths, chosen, args.samples, args.seed))
    if HITS in args.tasks:
        chosen = settings(hits.METHODS, hits.RATIOS)
        parts.append(Hits(model, args.lengths, chosen, args.samples, args.seed))
    if KL in args.tasks:
        parts.append(_divergence(args, model, settings(kl.METHODS, kl.RATIOS)))
    run = {
        "model": args.model or "bundled",
        "backend": args.backend,
        "kv_dtype": dtype_name(model.kv_dtype),
        "text": args.text[0] if args.text and TEXT_TASKS & set(tasks) else None,
        "questions": args.questions,
        "xkv": version("xkv"),
        **json.loads(json.dumps(grouping)),  # lists, as in the file
        **model.versions,
    }
    began = time.perf_counter()
    folder = Path(args.out)
    with Store(args.out, run) as store:
        _run(parts, store, args.out)
        about = {"kv_dtype": run["kv_dtype"], "dtype": dtype_name(model.dtype)}
        record = partial(
            make_record,
            command=args.command,
            model=run["model"],
            backend=args.backend,
            settings=about,
        )
        written = report_scores(store, folder, record) if tasks else []
        if HITS in args.tasks:
            written += report_hits(store, folder, record)
        if KL in args.tasks:
            written += report_divergence(store, folder, args.continuation, model, record)
    if written:
        seconds = time.perf_counter() - began
        print(f"{args.out}: results.jsonl, {', '.join(written)}; {seconds:.0f} s", file=sys.stderr)


def _divergence(
    args: argparse.Namespace, model: LanguageModel, settings: Sequence[Setting]
) -> Divergence:
    texts = read_texts(args.text, model, max(args.lengths) + args.continuation)
    folder = Path(args.prefills or Path(args.out, "prefills"))
    prefills = Prefills(folder, model, checkpoint_code(args.model or str(CHECKPOINT_DIR)))
    return Divergence(model, texts, args.lengths, settings, args.continuation, prefills)


def _run(parts: Sequence[Part], store: Store, out: str) -> None:
    """All that is not done yet, under one bar."""
    with tqdm(total=sum(x.n_answers for x in parts), unit="answer", file=sys.stderr) as bar:

        def progress(n_answers: int, what: str) -> None:
            bar.set_description(what, refresh=not n_answers)
            bar.update(n_answers)

        try:
            for part in parts:
                part.run(store, progress)
        except KeyboardInterrupt:
            bar.close()
            print(
                f"\ninterrupted; what is done is in {out}, and the same command goes on",
                file=sys.stderr,
            )


def choose_tasks(args: argparse.Namespace) -> dict[str, MakeSample]:
    """The tasks asked for but ``hits`` and ``kl``, over the user's text where one is given.

    Raises:
        InputError: If a task is unknown or a file is missing.
    """
    known = *TASKS, *OTHER_TASKS
    unknown = [name for name in args.tasks if name not in known]
    if unknown:
        raise InputError(f"there is no task {unknown[0]!r}; tasks: {', '.join(known)}")
    if KL in args.tasks and not args.text:
        raise InputError("the task kl continues texts of your own: give --text FILE")
    tasks = {name: TASKS[name] for name in dict.fromkeys(args.tasks) if name in TASKS}
    for name in TEXT_TASKS & set(tasks):
        if args.text and len(args.text) > 1:
            raise InputError(
                f"--text names {len(args.text)} files, and {name} takes one: ask for kl apart"
            )
    if args.questions and not args.text:
        raise InputError("--questions needs the text that they are about: give --text")
    if args.text and PERPLEXITY in tasks:
        tasks[PERPLEXITY] = FileText(args.text[0]).make
    if args.text and "qa" in tasks:
        if not args.questions:
            raise InputError(
                "the task qa over --text needs --questions; or leave it out of --tasks"
            )
        tasks["qa"] = TextQuestions(args.text[0], args.questions).make
    return tasks


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that no evaluation can have.

    Raises:
        InputError: Naming the flag.
    """
    if args.samples < 1:
        raise InputError(f"--samples {args.samples} must be at least 1")
    if args.continuation < 2:
        raise InputError(f"--continuation {args.continuation} must be at least 2")
    for length in args.lengths:
        if length < 1:
            raise InputError(f"--lengths {length} must be at least 1")
    for ratio in args.ratios or []:
        if not ratio > 1:
            raise InputError(f"--ratios {ratio:g} must be above 1")


if __name__ == "__main__":
    main()
