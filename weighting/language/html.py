"""How specs and weights look in a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from weighting.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

_BARS, _WIDTH, _HEIGHT = 24, 240, 48


def escaped(text: str) -> str:
    """Return a text as HTML shows it, question marks for what would turn it around or not show."""
    return html.escape(printable(text, keep="\n\t"))


def spec_html(name: str, text: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """Return a spec: a line for each factor, and its text folded away.

    Args:
        name: What it is called.
        text: The spec as YAML.
        rows: Factor, level of its units, and pipeline.
    """
    return (
        f"<div><b>{escaped(name)}</b>{_table(('factor', 'per', 'pipeline'), rows)}"
        f"<details><summary>YAML</summary><pre>{escaped(text)}</pre></details></div>"
    )


def weights_html(token: Tensor, metrics: Mapping[str, Tensor]) -> str:
    """Return weights: their statistics, and how many tokens have which weight.

    Args:
        token: Final weights.
        metrics: By name, as `Weights.metrics`.
    """
    parts = [key.rpartition("/") for key in metrics]
    names = list(dict.fromkeys(name for name, _, _ in parts))
    kinds = ("min", "max", "ess_frac", "capped_frac")
    rows = [
        (name, *(f"{float(metrics[f'{name}/{kind}']):.4g}" for kind in kinds)) for name in names
    ]
    return f"<div>{_table(('weights', *kinds), rows)}{_histogram(token)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inside = (f"<{tag} style='text-align:left'>{escaped(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(inside)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _histogram(token: Tensor) -> str:
    """Return bars of how many of the tokens that count have which weight."""
    weights = token.detach().float().cpu().flatten()
    weights = weights[weights != 0]
    if not len(weights):
        return ""
    low, top = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    counts = weights.histc(_BARS, low, top)
    step, tallest = _WIDTH / _BARS, float(counts.max())
    bars = "".join(
        f"<rect x='{i * step:.1f}' y='{_HEIGHT - h:.1f}' width='{step - 1:.1f}' height='{h:.1f}'/>"
        for i, h in enumerate((counts / tallest * _HEIGHT).tolist())
    )
    title = f"{len(weights):,} tokens by weight, from {low:.3g} to {top:.3g}"
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' fill='#0072B2' role='img'>"
        f"<title>{title}</title>{bars}</svg><div>{title}</div>"
    )
