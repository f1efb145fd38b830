"""Train the bundled model: build its tokenizer, train, write the checkpoint, evaluate it.

    python scripts/train_tiny.py --work-dir /tmp/tiny --output xkv/tiny/checkpoint

The run is seeded and resumes from ``--work-dir`` when that holds a state. It goes to the next
training length whenever accuracy at the present one is above 90 %.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# run as a module, the scripts' folder is not where imports are looked for
sys.path.insert(0, str(Path(__file__).parent))

from training.checkpoint import save_checkpoint, take_weights
from training.exact_match import exact_match
from training.model import build_model
from training.sampler import Sampler
from training.tokenizer import build_tokenizer
from training.trainer import Trainer

# 4,608: a document of 4,096 tokens with its questions lies well inside the trained positions.
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 4608, 8192)


def setup_arg_parser() -> argparse.ArgumentParser:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Train, write and evaluate the bundled model.")
    parser.add_argument("--output", default="xkv/tiny/checkpoint", help="Checkpoint folder.")
    parser.add_argument("--work-dir", required=True, help="Training state; resumed if present.")
    parser.add_argument("--start-from", help="Checkpoint to start from instead of random weights.")
    parser.add_argument(
        "--first-length", type=int, default=LENGTHS[0], help="Training length to begin with."
    )
    parser.add_argument("--steps", type=int, default=1000, help="Optimizer steps in all.")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Peak learning rate.")
    parser.add_argument("--max-length", type=int, default=8192, help="Longest training length.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and documents.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Where to run.")
    parser.add_argument("--report-every", type=int, default=20, help="Steps between reports.")
    parser.add_argument("--save-every", type=int, default=50, help="Steps between saves.")
    parser.add_argument("--eval-only", action="store_true", help="Only evaluate --output.")
    parser.add_argument(
        "--eval-lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        help="Tokens of the documents that questions are asked about.",
    )
    parser.add_argument("--eval-questions", type=int, default=128, help="Questions a length.")
    return parser


def train(args: argparse.Namespace) -> None:
    """Train from scratch or from the state in ``args.work_dir``, and write the checkpoint."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    if args.start_from:
        take_weights(model, tokenizer, args.start_from)
    model = model.to(args.device).train()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_parameters / 1e6:.2f}M parameters, {len(tokenizer)} tokens", file=sys.stderr)
    lengths = [length for length in LENGTHS if length <= args.max_length]
    trainer = Trainer(model, Sampler(tokenizer, args.seed + 1), lengths, args.learning_rate)
    trainer.progress.stage = lengths.index(args.first_length)
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    state = work_dir / "state.pt"
    if state.exists():
        trainer.resume(state)
        print(f"resumed at step {trainer.progress.step}", file=sys.stderr)
    while trainer.progress.step < args.steps:
        trainer.step(args.steps, args.report_every)
        if trainer.progress.step % args.save_every == 0:
            trainer.save(state)
            save_checkpoint(model, tokenizer, work_dir / "checkpoint")
    trainer.save(state)
    save_checkpoint(model, tokenizer, Path(args.output))


def main() -> None:
    """Run the script."""
    args = setup_arg_parser().parse_args()
    if not args.eval_only:
        train(args)
    # What is evaluated is what was written: the float16 weights, computed in float32.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    model = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    model = model.to(args.device).eval()
    for n_tokens in args.eval_lengths:
        accuracy = exact_match(model, tokenizer, n_tokens, args.eval_questions, first_seed=10**9)
        print(f"{n_tokens} tokens: {accuracy:.2%} of {args.eval_questions} answers exact")


if __name__ == "__main__":
    main()
