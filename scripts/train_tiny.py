"""Train the bundled model: build its tokenizer, train, write the checkpoint, evaluate it.

    python scripts/train_tiny.py --work-dir /tmp/tiny --output xkv/tiny/checkpoint

The run is seeded and resumes from ``--work-dir`` when that holds a state. It goes to the next
training length whenever accuracy at the present one is above 90 %.
"""

import argparse
import copy
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xkv.errors import InputError
from xkv.evaluation.tasks import TASKS
from xkv.evaluation.tasks.haystack import draw_names, draw_number, draw_uuid
from xkv.tiny import documents

PAD, BOS, END, UNKNOWN = "<pad>", "<s>", "<|end|>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, UNKNOWN)
PUNCTUATION = ".,?!;:'\"()[]{}-_/\\&%$#@*+=<>|~^`"
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# 4,608: a document of 4,096 tokens with its questions lies well inside the trained positions.
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 4608, 8192)
RECALL_LENGTH = 256
TASK_LENGTH = 256  # From this length on, most sequences are of the evaluation's tasks.
CONVERSATION_SHARE = 0.2
TASK_WEIGHTS = {
    "needle": 3.0,
    "multikey": 1.5,
    "multivalue": 3.0,
    "multiquery": 3.0,
    "variables": 1.5,
    "qa": 0.3,
    "key_value": 1.0,
    "common_words": 0.5,
    "frequent_words": 0.5,
    "multiturn": 1.0,
}
# What to list next is learned far more slowly than how to copy it.
LIST_WEIGHT = 4.0
OPTIONAL_TASKS = ("key_value", "common_words", "frequent_words")  # No stage waits for these.
TOKENS_PER_STEP = 4608
FILLER_WEIGHT = 0.02
QUESTION_TOKENS = 17  # The longest question with its answer and special tokens.
ANSWER_TOKENS = 6  # Name, verb, adjective, noun, period, end.


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram tokenizer: one piece a known word; numbers by three digits, hexadecimal by two.

    Letters, digits and bytes are there for all else. A value's first piece includes the space
    before it: a space alone would hide from the next token which key came before.
    """
    words = [("▁" + word, -2.0) for word in sorted({*documents.vocabulary(), *task_words()})]
    small = [(piece, -8.5) for piece in ("▁", *PUNCTUATION, *ALPHANUMERIC)]
    small += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    digits = [(f"{number:03}", -8.0) for number in range(1000)]
    digits += [(f"{number:02x}", -9.0) for number in range(256)]
    digits += [("▁" + piece, score) for piece, score in digits]
    pieces = [(special, 0.0) for special in SPECIALS] + words + [("▁->", -2.0)] + small + digits
    unigram = models.Unigram(pieces, unk_id=SPECIALS.index(UNKNOWN), byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # mlx-lm recognizes exactly this sequence and streams without decoding again from the start.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def task_words() -> set[str]:
    """The words of instructions, questions and answers of the evaluation's tasks."""
    words: set[str] = set()
    for make in TASKS.values():
        sample = make(0, 2000, lambda text: len(text.split()))
        intro = re.split("\n", sample.context)[0]
        texts = [intro, *(f"{q.text} {q.prefix}" for q in sample.questions)]
        # a UUID's letters are no words
        words.update(word for text in texts for word in re.findall(r"\b[A-Za-z]{2,}\b", text))
    return {word for word in words if not re.fullmatch("[0-9a-f]+", word)}


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about 6M parameters, random but for the induction circuit planted in it."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * config.num_hidden_layers))
        plant_induction_circuit(model, torch.Generator().manual_seed(seed))
    return model


def plant_induction_circuit(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Write the heads that retrieval is made of into the initial weights.

    Without them training stays on the plateau of guessing among the values in the document.
    Heads 0 and 1 of layer 0 attend one and two tokens back and write that token into a subspace of
    its own: their queries and keys are constant, so RoPE alone decides. In layers 1 and 3, head 0
    attends to where the current token was the previous one, and head 2 to where the current and
    the previous token were the previous one and the one before it; both copy what they find.
    """
    config = model.config
    head_dim, half, quarter, n_fast = config.head_dim, config.head_dim // 2, config.head_dim // 4, 6
    strength, write, match = 5.0, 0.04, 1.2
    frequencies = model.model.rotary_emb.inv_freq[:n_fast]

    def subspace() -> torch.Tensor:
        gaussian = torch.randn(config.hidden_size, head_dim, generator=generator)
        return torch.linalg.qr(gaussian)[0].T

    def head(index: int) -> slice:
        return slice(index * head_dim, (index + 1) * head_dim)

    token, previous, before_previous = subspace(), subspace(), subspace()

    attention = model.model.layers[0].self_attn
    attention.k_proj.bias[:n_fast] = strength
    attention.v_proj.weight[head(0)] = token
    for index, target in enumerate((previous, before_previous)):
        angles = frequencies * (index + 1)
        bias = attention.q_proj.bias[head(index)]
        bias[:n_fast] = strength * torch.cos(angles)
        bias[half : half + n_fast] = -strength * torch.sin(angles)
        attention.o_proj.weight[:, head(index)] += write * target.T

    # The slow half of the rotary pairs turns little: a match there does not depend on distance.
    slow = torch.cat([torch.arange(quarter, half), torch.arange(half + quarter, head_dim)])
    first, second = head_dim + slow[:quarter], head_dim + slow[quarter:]  # Rows of KV head 1.
    for layer in (1, 3):
        attention = model.model.layers[layer].self_attn
        keys, queries = attention.k_proj.weight, attention.q_proj.weight
        keys[slow] += match * previous[:half]
        queries[slow] += match * token[:half]
        # Query head 2 is the first that reads KV head 1.
        keys[first] += match * previous[half : half + quarter]
        queries[head_dim + first] += match * token[half : half + quarter]
        keys[second] += match * before_previous[:quarter]
        queries[head_dim + second] += match * previous[:quarter]
        for kv_index, index in ((0, 0), (1, 2)):
            attention.v_proj.weight[head(kv_index)] += token
            attention.o_proj.weight[:, head(index)] += write * token.T


def take_weights(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Take a checkpoint's weights; embeddings of tokens it does not have stay random."""
    source = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    numbers = PreTrainedTokenizerFast.from_pretrained(path).get_vocab()
    rows = model.state_dict()["model.embed_tokens.weight"]
    weights = source.state_dict()
    known = weights["model.embed_tokens.weight"]
    rows *= known.std() / rows.std()
    for token, index in tokenizer.get_vocab().items():
        if token in numbers:
            rows[index] = known[numbers[token]]
    model.load_state_dict(weights | {"model.embed_tokens.weight": rows, "lm_head.weight": rows})


class Sampler:
    """Draws training sequences: the kind, token ids, and one loss weight a token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.list_marks = frozenset(tokenizer.convert_tokens_to_ids([",", ":"]))

    def batch(self, length: int, is_recall: bool) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Kind of each row, token ids and loss weights, ``[B, length]`` of TOKENS_PER_STEP tokens.

        A kind is a task's name, "document" or "recall".
        """
        kinds, rows = [], []
        for _ in range(max(1, TOKENS_PER_STEP // length)):
            kind = "recall"
            if not is_recall:
                kind = self._draw_kind(length)
            draw = {"recall": self._recall, "document": self._conversation}.get(kind)
            row = draw(length) if draw else self._task(kind, length)
            if any(row[1]):
                kinds.append(kind)
                rows.append(row)
        if not rows:
            return self.batch(length, is_recall)
        ids = [row + [self.tokenizer.pad_token_id] * (length - len(row)) for row, _ in rows]
        weights = [row + [0.0] * (length - len(row)) for _, row in rows]
        return kinds, torch.tensor(ids), torch.tensor(weights)

    def _draw_kind(self, length: int) -> str:
        if length < TASK_LENGTH or self.random.random() < CONVERSATION_SHARE:
            return "document"
        return self.random.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _conversation(self, length: int) -> tuple[list[int], list[float]]:
        """A document and many questions about it, in one of three layouts."""
        r = self.random
        n_facts = r.randint(1, max(4, min(100, length // 14)))
        n_questions = max(2, min(2 * n_facts, length // 2 // QUESTION_TOKENS, 48))
        n_tokens = length - n_questions * QUESTION_TOKENS - 8  # 8: what the longest layout adds.
        n_facts = max(1, min(n_facts, (n_tokens - 3) // 5))
        document = documents.make_document(r.randrange(2**40), n_tokens, n_facts)
        asked = r.sample(document.facts, n_facts) + r.choices(document.facts, k=n_questions)
        turns = [(documents.ask(r, fact.name), fact.answer) for fact in asked[:n_questions]]
        layout = r.random()
        if layout < 0.7:
            opening = [(f"{BOS}{USER}{document.text} {turns[0][0]}", FILLER_WEIGHT)]
        elif layout < 0.85:
            opening = [
                (f"{BOS}{USER}{document.text}{END}{ASSISTANT}", FILLER_WEIGHT),
                (f"Noted.{END}", 1.0),
                (f"{USER}{turns[0][0]}", 0.0),
            ]
        else:
            opening = [(f"{BOS}{SYSTEM}{document.text}{END}{USER}{turns[0][0]}", FILLER_WEIGHT)]
        parts = list(opening)
        for index, (question, answer) in enumerate(turns):
            prompt = f"{END}{ASSISTANT}" if index == 0 else f"{USER}{question}{END}{ASSISTANT}"
            parts += [(prompt, 0.0), (answer + END, 1.0)]
        return self._weighted(parts)

    def _task(self, name: str, length: int) -> tuple[list[int], list[float]]:
        """A sample of one of the evaluation's tasks, with as many of its questions as fit."""
        r = self.random
        n_tokens = max(length * 5 // 8, length - r.randint(80, 700))
        try:
            # a seed that no evaluation takes
            sample = TASKS[name](-1 - r.randrange(2**40), n_tokens, self._count)
        except InputError:  # too short for this task
            return [], []
        ids, weights = self._weighted([(f"{BOS}{USER}{sample.context}", 0.0)])
        questions = list(zip(sample.messages or [""] * 99, sample.questions, strict=False))
        if not sample.messages:
            r.shuffle(questions)
        for index, (message, question) in enumerate(questions):
            asked = f"{message} {question.text}{END}{ASSISTANT}"
            turn = self._weighted(
                [
                    (asked if index == 0 else USER + asked, 0.0),
                    (question.prefix, 0.0),
                    (question.answer + END, 1.0),
                ]
            )
            if len(ids) + len(turn[0]) > length:
                break
            weights += [
                LIST_WEIGHT * weight if before in self.list_marks else weight
                for before, weight in zip([0, *turn[0]], turn[1], strict=False)
            ]
            ids += turn[0]
        return ids, weights

    def _count(self, text: str) -> int:
        return len(self._encode(text))

    def _weighted(self, parts: Sequence[tuple[str, float]]) -> tuple[list[int], list[float]]:
        """Token ids of texts one after another, with each one's weight."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            piece = self._encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def _recall(self, length: int) -> tuple[list[int], list[float]]:
        """Facts repeated in random order; a value counts once its name was seen.

        Values are words, numbers or UUIDs: what is rare elsewhere is common here.
        """
        r = self.random
        draw = r.choice((None, draw_number, draw_uuid))
        n_facts = r.randint(2, max(3, min(32, length // (40 if draw is draw_uuid else 12))))
        if draw is None:
            document = documents.make_document(r.randrange(2**40), 5 * n_facts, n_facts)
            facts = [(fact.name, fact.said) for fact in document.facts]
        else:
            facts = [(f"{name}:", f"{draw(r)}.") for name in draw_names(r, n_facts)]
        rows = [(self._encode(name), self._encode(value)) for name, value in facts]
        ids, weights, seen = [self.tokenizer.bos_token_id], [0.0], set()
        while True:
            index = r.randrange(n_facts)
            name, value = rows[index]
            if len(ids) + len(name) + len(value) > length:
                return ids, weights
            ids += name + value
            weights += [0.0] * len(name)
            weights += [float(index in seen)] * (len(value) - 1) + [0.0]
            seen.add(index)


@dataclass
class Progress:
    """Where a run stands; ``accuracy`` is the running one at the present stage's length."""

    step: int = 0
    stage: int = 0
    accuracy: float = 0.0
    seconds: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)
    """Running accuracy of the answers' tokens, of any length."""


class Trainer:
    """One training run, which can be saved and resumed."""

    def __init__(
        self, model: LlamaForCausalLM, sampler: Sampler, lengths: Sequence[int], rate: float
    ):
        self.model = model
        self.sampler = sampler
        self.lengths = lengths
        self.rate = rate
        self.progress = Progress()
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.05},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(0.9, 0.98),
        )

    def save(self, path: Path) -> None:
        """Write everything that ``resume`` needs; the file is replaced whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.sampler.random.getstate(),
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self, path: Path) -> None:
        """Go on from a saved state."""
        # weights_only would refuse the state of the random generator; the file is our own.
        state = torch.load(path, map_location=self.model.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.random.setstate(state["random"])
        self.progress = Progress(**state["progress"])
        self.progress.stage = min(self.progress.stage, len(self.lengths) - 1)

    def step(self, n_steps: int, report_every: int) -> None:
        """Take one optimizer step of ``n_steps`` in all."""
        start = time.perf_counter()
        progress, r = self.progress, self.sampler.random
        longest = self.lengths[progress.stage]
        length = self._draw_length()
        is_recall = r.random() < (0.5 if progress.stage == 0 else 0.25)
        if is_recall:
            length = min(length, RECALL_LENGTH)
        warmup, decay = min(1.0, (progress.step + 1) / 150), max(0.05, 1 - progress.step / n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warmup * decay
        kinds, ids, weights = self.sampler.batch(length, is_recall)
        loss, is_right, is_answer = self._optimize(ids, weights)
        shares = (is_right & is_answer).sum(1) / is_answer.sum(1)
        for kind, share in zip(kinds, shares.tolist(), strict=True):
            before = progress.by_kind.get(kind, share)
            progress.by_kind[kind] = 0.95 * before + 0.05 * share
        needed = [
            share
            for kind, share in zip(kinds, shares.tolist(), strict=True)
            if kind not in OPTIONAL_TASKS
        ]
        if not is_recall and length == longest and needed:
            progress.accuracy = 0.9 * progress.accuracy + 0.1 * sum(needed) / len(needed)
        progress.seconds += time.perf_counter() - start
        if progress.step % report_every == 0:
            parts = " ".join(f"{kind} {share:.2f}" for kind, share in progress.by_kind.items())
            print(
                f"step {progress.step} length {length} loss {loss:.3f} "
                f"running {progress.accuracy:.3f} ({parts}) {progress.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        progress.step += 1
        if progress.accuracy > 0.9 and progress.stage + 1 < len(self.lengths):
            progress.stage += 1
            progress.accuracy = 0.0
            stage_length = self.lengths[progress.stage]
            print(f"length {stage_length} at step {progress.step}", file=sys.stderr, flush=True)

    def _draw_length(self) -> int:
        """Mostly the present stage's length; in the last stage any of the longer half."""
        r, stage = self.sampler.random, self.progress.stage
        if stage + 1 == len(self.lengths):
            return r.choice(self.lengths[stage // 2 :])
        return self.lengths[stage] if r.random() < 0.6 else r.choice(self.lengths[: stage + 1])

    def _optimize(
        self, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss, which next tokens were right, and which of them belong to an answer."""
        device = self.model.device
        ids, weights = ids.to(device), weights[:, 1:].to(device)
        targets, is_weighted = ids[:, 1:], weights > 0
        # on CPUs without matrix units bfloat16 takes twice the time of float32
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = self.model.model(ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[is_weighted]).float()
        losses = cross_entropy(logits, targets[is_weighted], reduction="none")
        loss = (losses * weights[is_weighted]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        is_right = torch.zeros_like(is_weighted)
        is_right[is_weighted] = logits.argmax(-1) == targets[is_weighted]
        return loss.item(), is_right, weights >= 1


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write a float16 checkpoint; each file is replaced whole, so no reader sees half of one."""
    path.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.float16)
    half.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    theta = half.config.rope_parameters["rope_theta"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # mlx-lm reads rope_theta at the top level; transformers 4 lacks the class that 5 names.
        _update_json(Path(folder, "config.json"), rope_theta=theta)
        _update_json(
            Path(folder, "tokenizer_config.json"), tokenizer_class="PreTrainedTokenizerFast"
        )
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, path / file.name)


def _update_json(path: Path, **entries: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    n_tokens: int,
    n_questions: int,
    first_seed: int,
) -> float:
    """Share of exact greedy answers; each question is asked alone, directly after its document.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        n_tokens: Length of the documents, without the question.
        n_questions: Questions in all, at most 16 a document.
        first_seed: Seed of the first document; the next ones count up.

    Returns:
        A share between 0 and 1.
    """
    n_right = n_asked = 0
    for seed in range(first_seed, first_seed + n_questions):
        document = documents.make_document(seed, n_tokens)
        n_facts = min(16, len(document.facts), n_questions - n_asked)
        text = tokenizer.encode(f"{BOS}{USER}{document.text}", add_special_tokens=False)
        prefix = DynamicCache(config=model.config)
        model(torch.tensor([text], device=model.device), past_key_values=prefix, logits_to_keep=1)
        for fact in random.Random(seed).sample(document.facts, n_facts):
            prompt = f"{fact.question}{END}{ASSISTANT}{fact.answer}{END}"
            ids = tokenizer.encode(prompt, return_tensors="pt", add_special_tokens=False)
            ids = ids.to(model.device)
            logits = model(ids, past_key_values=copy.deepcopy(prefix)).logits[0]
            # Greedy decoding gives the answer exactly when each token is the argmax in its place.
            predicted = logits[-ANSWER_TOKENS - 1 : -1].argmax(-1)
            n_right += bool((predicted == ids[0, -ANSWER_TOKENS:]).all())
        n_asked += n_facts
        if n_asked == n_questions:
            break
    return n_right / n_questions


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
