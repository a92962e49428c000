"""The proportions of domains that a run found, as a spec that draws data by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titan_integration.host.run_dir import writing
from weighting.build.domains import average_weights, live_weights, proportions
from weighting.mixture import mixture_text
from weighting.runs import layout
from weighting.runs.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from titan_integration.state.run import Run
    from weighting import Spec

FILE = layout.MIXTURE
"""Its name, below the dump folder, beside the metrics."""


def mixtures(run: Run) -> dict[str, dict[str, float]]:
    """Return proportions of the domains, each summing to one, by what they are.

    Every rank of a pipeline must call it.

    Returns:
        `mixture`, where the weights of domains move: as they stand; `average`: their average over
        the run, where it is kept; `drawn`: what the step's data is drawn by, if by anything.
    """
    fn, found = run.fn, dict[str, Tensor]()
    if not fn.domains:
        return {}
    if live := live_weights(fn, run.step):
        found["mixture"] = torch.stack([*live.values()]).prod(0)
    if live and live.keys() == (averages := average_weights(fn)).keys():
        found["average"] = torch.stack([*averages.values()]).prod(0)
    if fn.plan.sampling:
        found["drawn"] = proportions(fn, run.step) if run.draws is None else run.draws.used
    named: dict[str, dict[str, float]] = {}
    for kind, x in found.items():
        known = run.from_last(x)
        shares = (known / known.sum()).tolist()
        named[kind] = dict(zip(fn.domains, shares, strict=True))
    return named


def write_mixture(
    path: Path,
    spec: Spec,
    found: Mapping[str, Mapping[str, float]],
    steps: int,
    provenance: Mapping[str, str],
) -> None:
    """Write the average of moving domain weights over a run where it is kept, else the last.

    Args:
        path: The file.
        spec: What weighed the run.
        found: Shares of the domains, as `mixtures` returns, `mixture` among them.
        steps: How many steps were trained.
        provenance: What else to say of the run, by what it is.
    """
    kind = "average" if "average" in found else "mixture"
    facts = {
        "spec": f"{spec.name} {spec.hash}",
        "proportions": f"{kind} of {steps} steps" if kind == "average" else "the last",
        "at the end": shown(found["mixture"]),
        **provenance,
    }
    title = f"Proportions of domains found by {spec.name}."
    text = mixture_text(f"{spec.name}-mixture", found[kind], title, facts)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def shown(shares: Mapping[str, float]) -> str:
    """Return proportions in one line."""
    return ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
