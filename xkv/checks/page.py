"""The page of ``python -m xkv.inspect``: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from xkv.checks.plots import draw
from xkv.checks.set_plots import repeated
from xkv.cli.terminal import size_text
from xkv.errors import InputError
from xkv.planning.grouping import layers_text

PAGE = "index.html"

ALT = {
    "spectra": "Four line plots: singular values of each group, and relative error against bytes, "
    "for keys and for values.",
    "similarity": "Two heat maps, of keys and of values: the CKA of every two layers, with the "
    "groups framed.",
    "errors": "Dots over layers: the relative errors of keys and values that the table lists.",
    "bands": "A bar for each latent, as long as it has columns and shaded by their bits, as the "
    "table lists them.",
    "working_set": "One picture for each watched layer and KV head: stored positions from left to "
    "right, decode steps from top to bottom, rebuilt rows orange and recent rows blue.",
    "repeats": "A line over steps for each watched layer: the share of rebuilt rows that the step "
    "before rebuilt too.",
}
"""What each picture shows, for those who do not see it."""

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { --text: #1c1e21; --soft: #59606b; --page: #fff; --line: #d5d9e0; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #a3abb8; --page: #15171b; --line: #383d46; --card: #1f2329 }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
figure { margin: 1rem 0 }
figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; padding: .4rem 0 }
caption { white-space: nowrap }
.wide { overflow-x: auto }
.wide:focus-visible { outline: 2px solid #3b82f6 }
img { display: block; width: 100%; min-width: 40rem; height: auto; background: #fff;
  border-radius: 6px }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; overflow-wrap: normal }
tbody th, th:first-child, .facts td { text-align: left }
.facts td { overflow-wrap: anywhere }
@media (max-width: 36rem) { .facts th, .facts td { display: block; border: 0; padding: 0 }
  .facts td { margin-bottom: .7rem } }
code, pre { font: .85rem/1.5 ui-monospace, monospace; background: var(--card); border-radius: 4px }
code { padding: .1rem .3rem; white-space: pre-wrap }
summary { cursor: pointer; padding: .4rem 0 }
</style>
</head>
<body>
{% macro picture(name) %}
<figure>
<div class="wide" tabindex="0" role="group" aria-label="{{ name.replace('_', ' ') }}">
<img src="data:image/png;base64,{{ pictures[name] }}" alt="{{ alt[name] }}"></div>
<figcaption>{{ report.captions[name] }}</figcaption>
</figure>
{% endmacro %}
{% macro table(caption, head, rows) %}
<div class="wide" tabindex="0" role="group" aria-label="{{ caption }}"><table>
<caption>{{ caption }}</caption>
<thead><tr>{% for x in head %}<th scope="col">{{ x }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows -%}
<tr><th scope="row">{{ row[0] }}</th>{% for x in row[1:] %}<td>{{ x }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<table class="facts"><tbody>
{% for name, fact in facts -%}
<tr><th scope="row">{{ name }}</th><td>{{ fact }}</td></tr>
{% endfor -%}
<tr><th scope="row">Prompt begins</th><td><code>{{ report.prompt }}</code></td></tr>
<tr><th scope="row">Command</th><td><code>{{ report.command }}</code></td></tr>
</tbody></table>
</header>
<main>
<h2>Spectra</h2>
{{ picture("spectra") }}
<h2>Similarity of layers</h2>
{{ picture("similarity") }}
<h2>Plan</h2>
{{ picture("bands") }}
{{ table("Columns of each latent and their bits", ["layers", "of", "columns", "columns × bits"],
         plan) }}
<h2>Errors</h2>
{{ picture("errors") }}
{{ table("Relative error of each layer's stored rows", ["layer", "group", "keys", "values"],
         errors) }}
<h2>The working set over time</h2>
{% if report.working_set.why_not %}
<p>{{ report.working_set.why_not }}</p>
{% else %}
<p>{{ n_steps }} decode steps after the prompt, one token each: {{ report.working_set.n_opening }}
that open a reply, then the model's likeliest ones, past the end of its answer too.</p>
{{ picture("working_set") }}
{{ picture("repeats") }}
{{ table("Rebuilt rows, means over all steps", ["layer", "KV head", "rows a step",
         "share that repeats"], sets) }}
<details>
<summary>Each step</summary>
{{ table("Share of rebuilt rows that repeat, mean over KV heads", step_head, steps) }}
</details>
{% endif %}
</main>
</body>
</html>
"""


def write_page(folder: Path, report: dict[str, Any]) -> str:
    """Write what :func:`xkv.evaluation.inspection.inspect` measured as one page.

    Args:
        folder: Where it goes.
        report: With the ``command`` and the ``name`` of the model that it was asked with.

    Returns:
        Name of the file.

    Raises:
        InputError: If matplotlib is missing or the file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.from_string(TEMPLATE).render(
        title=f"Inside the cache of {report['name']}",
        report=report,
        alt=ALT,
        pictures={name: _png(name, report) for name in report["captions"]},
        facts=_facts(report),
        plan=_plan(report),
        errors=error_rows(report),
        **_working_set(report["working_set"]),
    )
    path = folder / PAGE
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return path.name


def _png(name: str, report: dict[str, Any]) -> str:
    """A plot as base64."""
    file = io.BytesIO()
    draw(name, report).savefig(file, format="png", dpi=120)
    return base64.b64encode(file.getvalue()).decode()


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What does not depend on the machine."""
    config, n_tokens, n_stored = report["config"], report["n_tokens"], report["n_compressed"]
    dense, held, n_sinks = report["dense_bytes"], report["held_bytes"], report["n_sinks"]
    asked = config["compression"]
    groups = ", ".join(layers_text(group) for group in report["groups"])
    versions = ", ".join(f"{name} {x}" for name, x in report["versions"].items())
    return [
        ("Model", report["model"]),
        (
            "Prompt",
            f"{n_tokens} tokens: {n_stored} stored, dense the {n_sinks} first and "
            f"{n_tokens - n_sinks - n_stored} last",
        ),
        ("Compression asked", f"{asked:g} x" if asked else "none: ranks were given"),
        (
            "Compression held",
            f"{dense / held:.2f} x: {size_text(dense)} dense, {size_text(held)} held",
        ),
        ("Layers that share a latent", groups),
        ("Basis", "the model's own" if report["is_model_basis"] else "this prompt's"),
        ("Computed with", f"{report['backend']}: {versions}"),
    ]


def _plan(report: dict[str, Any]) -> list[list[str]]:
    """A row for each latent."""
    rows = []
    for (number, tensor), of in groupby(report["bands"], lambda x: (x["group"], x["tensor"])):
        bands = [(band["latent_bits"], band["n_columns"]) for band in of]
        runs = [(bits, sum(n for _, n in x)) for bits, x in groupby(bands, lambda x: x[0])]
        rows.append(
            [
                layers_text(report["groups"][number]),
                tensor,
                str(sum(n for _, n in runs)),
                ", ".join(f"{n}\u00a0×\u00a0{bits}" for bits, n in runs),
            ]
        )
    return rows


def error_rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each layer: its number, its group, the errors of keys and of values."""
    group_of = {layer: str(i) for i, group in enumerate(report["groups"]) for layer in group}
    return [
        [
            str(layer),
            group_of.get(layer, "–"),
            *("dense" if x is None else f"{x:.4f}" for x in pair),
        ]
        for layer, pair in enumerate(zip(*report["errors"].values(), strict=True))
    ]


def _working_set(story: dict[str, Any]) -> dict[str, Any]:
    """What the page says of it."""
    if story["why_not"] is not None:
        return {}
    layers = story["layers"]
    shares = [np.array([repeated(head) for head in layer["heads"]]) for layer in layers]
    by_step = [["–"] * len(layers)]
    by_step += [[f"{x:.1%}" for x in row] for row in np.transpose([x.mean(0) for x in shares])]
    return {
        "n_steps": len(story["tokens"]),
        "sets": [
            [str(layer["layer"]), number, f"{np.mean([len(x) for x in head]):.1f}", f"{again:.1%}"]
            for layer, of in zip(layers, shares, strict=True)
            for number, (head, again) in enumerate(zip(layer["heads"], of.mean(1), strict=True))
        ],
        "step_head": ["step", "token", *(f"layer {layer['layer']}" for layer in layers)],
        "steps": [
            [str(i + 1), token, *row]
            for i, (token, row) in enumerate(zip(story["tokens"], by_step, strict=True))
        ],
    }
