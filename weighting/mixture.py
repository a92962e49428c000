"""Mixtures: specs whose domain weights say in which proportions training data is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weighting.build.checks import order_problems
from weighting.build.targets import targets_of
from weighting.errors import Problem, SpecError, printable
from weighting.spec import Spec, dumps
from weighting.stages import MeanOne, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weighting.spec import Apply

MIXTURE = "mixture"
"""The name of the factor that a mixture becomes in another spec."""


def with_mixture(spec: Spec, mixture: Spec) -> Spec:
    """Return a spec whose training data is drawn by a mixture; its weights stay as they are.

        p_d = mixture_d / sum_e mixture_e

    Args:
        spec: How to weigh what is drawn.
        mixture: A spec with `apply: sampling` whose factors all weigh domains.

    Raises:
        SpecError: The mixture draws nothing or weighs the loss too, or the spec draws by itself.
    """
    if problems := order_problems(mixture):
        raise SpecError(problems)
    if {*targets_of(mixture).values()} != {"sampling"}:
        message = (
            f"{mixture.name} is no mixture: every factor of one weighs domains, and it says "
            "apply: sampling"
        )
        raise SpecError([Problem(message)])
    where: dict[str, Apply] = {
        name: acts for name, acts in targets_of(spec).items() if acts != "loss"
    }
    if drawing := [name for name, acts in where.items() if acts == "sampling"]:
        message = (
            f"{spec.name} draws data by its factor {drawing[0]}, and {mixture.name} would as "
            "well; leave out one of them"
        )
        raise SpecError([Problem(message)])
    single = len(mixture.factors) == 1
    added = {
        MIXTURE if single else f"{MIXTURE}-{name}": pipeline
        for name, pipeline in mixture.factors.items()
    }
    if taken := sorted(spec.factors.keys() & added.keys()):
        message = f"{spec.name} has a factor {taken[0]!r} already; give it another name"
        raise SpecError([Problem(message)])
    joined = spec.model_dump(include={*Spec.model_fields} - {"factors", "apply", "plugins"})
    for name in added:
        where[name] = "sampling"
    return Spec(
        factors={**spec.factors, **added},
        apply=where,
        plugins=tuple(dict.fromkeys([*spec.plugins, *mixture.plugins])),
        **joined,
    )


def mixture_text(
    name: str, proportions: Mapping[str, float], title: str, provenance: Mapping[str, object]
) -> str:
    """Return a mixture as a spec file with comments that say where it comes from.

    Args:
        name: What to call it.
        proportions: The share of each domain, from 0.
        title: What it is, in a sentence.
        provenance: How it was made, one line each.
    """
    total = sum(proportions.values())
    shares = {domain: round(share / total, 6) for domain, share in proportions.items()}
    table = Table.model_validate({"weights": shares})
    spec = Spec(name=name, apply="sampling", factors={"pipeline": (table, MeanOne())})
    notes = [f"{key}: {value}" for key, value in provenance.items()]
    comments = [title, "", "  weighting train specs/linupper.yaml --mixture FILE", "", *notes]
    # What is not printable would end a comment, or is what YAML forbids in one.
    lines = [f"# {printable(line)}".rstrip() for text in comments for line in text.split("\n")]
    return "\n".join([*lines, dumps(spec, "yaml")])
