"""One training run: steps, lengths that grow with accuracy, and a state to resume from."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from training.sampler import Sampler

RECALL_LENGTH = 256
OPTIONAL_TASKS = ("key_value", "common_words", "frequent_words")  # No stage waits for these.


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
