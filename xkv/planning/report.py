"""What becomes of each layer of a model's cache, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["compressed", "bypassed", "dense", "native"]

_MEANING = {
    "compressed": "compressed",
    "bypassed": "compressed, rebuilt in every step (their attention bypasses ours)",
    "dense": "dense",
    "native": "native",
}


@dataclass(frozen=True)
class LayerReport:
    """One layer's cache.

    Args:
        layer_idx: Number of the cache in the prompt cache.
        kind: ``compressed``; ``bypassed``: compressed, but the model's attention does not go
            through the function that we replace, so that keys and values are rebuilt in each step;
            ``dense``: a full cache that the configuration leaves alone; ``native``: another kind
            of cache, left to mlx-lm.
        group: The layers that share its latent.
        detail: Why it is not compressed.
    """

    layer_idx: int
    kind: LayerKind
    group: tuple[int, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All layers of a model, one line each when printed, equal neighbours together."""

    model: str
    layers: tuple[LayerReport, ...]
    why_not_layerwise: str | None = None

    def __str__(self) -> str:
        runs: list[list[LayerReport]] = []
        for layer in self.layers:
            is_same = runs and (runs[-1][0].kind, runs[-1][0].group, runs[-1][0].detail) == (
                layer.kind,
                layer.group,
                layer.detail,
            )
            if is_same:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        lines = []
        for run in runs:
            first, last = run[0], run[-1]
            span = str(first.layer_idx) if first is last else f"{first.layer_idx}-{last.layer_idx}"
            line = f"layer {span}: {_MEANING[first.kind]}"
            if first.group and len(first.group) > len(run):
                line += f", with layers {', '.join(map(str, first.group))}"
            lines.append(line + (f" ({first.detail})" if first.detail else ""))
        return "\n".join([f"{self.model}:", *lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences on what is slower or less exact than it could be."""
        sentences = []
        if self.why_not_layerwise:
            sentences.append(
                f"prompts of {self.model} are compressed in segments as they stream in, and later "
                f"parts see the compressed earlier ones: {self.why_not_layerwise}"
            )
        return sentences

    def count(self, kind: LayerKind) -> int:
        """Layers of one kind."""
        return sum(layer.kind == kind for layer in self.layers)
