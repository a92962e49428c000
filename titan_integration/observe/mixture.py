"""The proportions of domains that a run found, as a spec that draws data by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_integration.host.run_dir import writing
from weighting.mixture import mixture_text
from weighting.runs import layout
from weighting.runs.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from weighting import Spec

FILE = layout.MIXTURE
"""Its name, below the dump folder, beside the metrics."""


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
        found: Shares of the domains, as `RunState.mixtures`, `mixture` among them.
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
