"""What users' code and files rest on: names, arguments, defaults, commands and words of a spec.

A line may be added here in any version; one that changes or goes is a break, and belongs into the
changelog with what to do.
"""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weighting as wt
from weighting import testing
from weighting.cli import main
from weighting.registry import stages
from weighting.schedules import SCHEDULES

CALLS = {
    "load": "path, allow_plugins=False",
    "loads": "text, source='<spec>', allow_plugins=False",
    "dumps": "spec, spelling='arrow'",
    "build": "spec, domains=None, collectives=None",
    "simulate": (
        "spec, loss=None, step=0, entropy=None, target_prob=None, error_norm=None, ref_loss=None, "
        "domain=None"
    ),
    "weighted_cross_entropy": (
        "logits, labels, fn, step=0, domain_ids=None, segment_ids=None, ref_loss=None, "
        "columns=None, sequence_ids=None"
    ),
    "linear_weighted_cross_entropy": (
        "hidden, weight, labels, fn, bias=None, step=0, domain_ids=None, segment_ids=None, "
        "ref_loss=None, columns=None, memory='auto', chunks=8, sequence_ids=None"
    ),
    "stage": "name",
    "Signals": (
        "loss, valid=None, entropy=None, target_prob=None, error_norm=None, ref_loss=None, "
        "domain_ids=None, segment_ids=None, sequence_ids=None, columns=<factory>"
    ),
}
"""Calls of `weighting`; an argument that goes by name may move."""
TESTING = {
    "check_stage": "stage",
    "parametrize_with_checks": "stages, expected_failed_checks=None",
    "assert_weights": "spec, expect, loss=None, step=0, atol=1e-06, share=False, signals",
}
TYPES = (
    "Spec SpecError NonFiniteSignalError OneUnitWarning Weighting Weights Stage Source Pool Shape "
    "Weigh Constrain Scope Number NonNegativeNumber PositiveNumber UnitNumber"
)
COMMANDS = (
    "check compare completion doctor explain list mix new-stage plot replay report schema score "
    "simulate tokens train"
)
STAGES = (
    "abs affine as_is bandit bernoulli clamp clip column context_gain doge doremi dynamic_loading "
    "entropy error_norm excess_loss exp exponentiated extremes floor focal gate interpolate "
    "linupper loss max mean mean_one multinomial normalize pow quadratic rank running select sum "
    "table target_prob temperature threshold tilted token_scale topical topics topk_entropy uniform"
)
LOSSES = wt.Signals(loss=torch.ones(2, 3))
KEYS = "version name factors plugins normalize reduction scope on_nonfinite apply"


def told(call):
    """Return a call's arguments and defaults in one line."""
    return ", ".join(
        x.name if x.default is x.empty else f"{x.name}={x.default!r}"
        for x in inspect.signature(call).parameters.values()
    )


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [*((wt, *item) for item in CALLS.items()), *((testing, *item) for item in TESTING.items())],
)
def test_every_promised_argument_and_default_is_there(module, name, arguments):
    """Its arguments are there, with their defaults; new ones have defaults, and follow."""
    now = told(getattr(module, name))
    assert now == arguments or now.startswith(f"{arguments}, ")
    rest = now.removeprefix(arguments)
    assert all("=" in x for x in rest.split(", ") if x)


@pytest.mark.parametrize(
    ("promised", "there"),
    [
        (TYPES, dir(wt)),
        ("token factors metrics moments", dir(wt.build(wt.loads("uniform"))(LOSSES, 0))),
        ("needs spec check", dir(wt.build(wt.loads("uniform")))),
        (COMMANDS, main.commands),
        (STAGES, stages()),
        ("constant step linear cosine exponential piecewise", SCHEDULES),
        (KEYS, wt.Spec.model_fields),
    ],
    ids=["types", "weights", "weighting", "commands", "stages", "schedules", "keys"],
)
def test_a_name_that_was_there_is(promised, there):
    """Names are added, none goes."""
    assert [name for name in promised.split() if name not in there] == []


def test_every_public_name_is_there_when_asked_for():
    """The table of lazy names, `__all__`, `dir` and what type checkers see are the same names."""
    tree = ast.parse(Path(wt.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    aliases = {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)}
    typed = aliases | {x.asname for node in imports for x in node.names if x.asname}
    assert typed == {*wt.__all__}
    assert typed <= {*dir(wt)}
    for node in imports:
        if not node.names[0].asname:
            continue  # for the aliases
        found = {alias.name: getattr(wt, alias.name) for alias in node.names}
        module = sys.modules[node.module]
        assert found == {name: getattr(module, name) for name in found}
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = wt.biuld


@pytest.mark.slow
def test_importing_the_package_imports_no_torch_and_submodules_hide_no_function():
    """`import weighting` is light, and `weighting.build` is a function after its room is loaded."""
    code = (
        "import sys, weighting as wt\n"
        "assert 'torch' not in sys.modules\n"
        "import weighting.build.plan, weighting.simulate\n"
        "assert callable(wt.build) and callable(wt.simulate)\n"
        "wt.build(wt.loads('uniform'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
