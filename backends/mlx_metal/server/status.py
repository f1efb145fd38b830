"""The page of ``GET /xkv``: what the server holds and does, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xkv.cli.terminal import size_text

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load and who may frame it, as ``Content-Security-Policy`` says it."""
_REFRESH_S = 5
_LABELS = {
    ("memory", "sequences"): "Cached prompts",
    ("memory", "tokens"): "Their tokens",
    ("memory", "held_bytes"): "Their caches",
    ("memory", "dense_bytes"): "The same in dense caches",
    ("memory", "reserved_bytes"): "Reserved for what is being answered",
    ("memory", "limit_bytes"): "Cap of both, --prompt-cache-bytes",
    ("memory", "model_bytes"): "Weights",
    ("memory", "basis_bytes"): "The model's basis, for all prompts",
    ("memory", "active_memory_bytes"): "In use by MLX",
    ("memory", "peak_memory_bytes"): "In use by MLX at most",
    ("memory", "memory_limit_bytes"): "Memory for MLX",
    ("requests", "prefill_tps"): "Tokens a second, last prompts",
    ("requests", "decode_tps"): "Tokens a second, last answers",
    ("disk", "limit_bytes"): "Cap, --prompt-cache-disk-bytes",
}
"""What does not say by its part and name in the report what it is."""

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="refresh" content="{{ refresh_s }}">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --text: #1c1e21; --soft: #59606b; --page: #fff; --line: #d5d9e0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #a3abb8; --page: #15171b; --line: #383d46 }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 48rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.2 }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
p { color: var(--soft); margin: .3rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal }
tbody th { text-align: left; font-weight: normal }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<main>
{% for name, facts in sections %}
<h2>{{ name }}</h2>
<div class="wide"><table><tbody>
{% for label, fact in facts -%}
<tr><th scope="row">{{ label }}</th><td>{{ fact }}</td></tr>
{% endfor -%}
</tbody></table></div>
{% endfor %}
<h2>Cached prompts</h2>
{% if conversations %}
<div class="wide"><table>
<thead><tr>{% for x in head %}<th scope="col">{{ x }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in conversations -%}
<tr>{% for x in row %}<td>{{ x }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
<p>What several share counts in each of them, and once in the sum above.</p>
{% else %}
<p>There are none yet.</p>
{% endif %}
</main>
</body>
</html>
"""


def page(report: Mapping[str, Any], model: str) -> str:
    """The page of a report.

    Args:
        report: What ``GET /xkv/memory`` answers.
        model: Name of the model that is served.
    """
    from jinja2 import Environment, StrictUndefined

    rest = {name: x for name, x in report.items() if name != "conversations"}
    parts = {name: x for name, x in rest.items() if isinstance(x, dict)}
    sections = {"memory": {name: x for name, x in rest.items() if name not in parts}, **parts}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=f"xkv serves {model}",
        refresh_s=_REFRESH_S,
        sections=[
            (_label(part), [(_label(name, part), _text(name, x)) for name, x in facts.items()])
            for part, facts in sections.items()
        ],
        head=["tokens", "held", "ratio", "last used"],
        conversations=[
            [
                _text("tokens", x["tokens"]),
                _text("held_bytes", x["held_bytes"]),
                _text("ratio", x["ratio"]),
                f"{_text('idle_s', x['idle_s'])} ago",
            ]
            for x in report["conversations"]
        ],
    )


def _label(name: str, part: str = "") -> str:
    plain = name.removesuffix("_bytes").removesuffix("_s").replace("_", " ").capitalize()
    return _LABELS.get((part, name), plain)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return size_text(value)
    if name == "ratio":
        return f"{value:.2f} x"
    if name.endswith("_s"):
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
