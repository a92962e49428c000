"""Weights compared with those expected, shown as a table when they differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weighting.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weighting.spec import Spec


def assert_weights(
    spec: Spec | str,
    *,
    expect: Sequence[float],
    loss: Sequence[float] | None = None,
    step: int = 0,
    atol: float = 1e-6,
    share: bool = False,
    **signals: Any,  # noqa: ANN401 - whatever `simulate` takes
) -> None:
    """Assert that a spec gives these weights for these losses.

        assert_weights("temperature(1)", loss=[1.0, 1.0], expect=[1.0, 1.0])

    Args:
        spec: A spec, the path or name of one, or arrow text.
        expect: Weight of each unit; their mean is one.
        loss: Loss of each unit, nats.
        step: Optimizer step at which schedules are read.
        atol: How much a weight may differ.
        share: The expected weights are shares of the total: their sum, not their mean, is one.
        **signals: Further signals, one value per unit, as `wt.simulate` takes them.

    Raises:
        AssertionError: A weight differs; shows unit, loss, got, expected and difference.
        SpecError: The spec is wrong.
        ValueError: The signals are; see `wt.simulate`.
    """
    weights = [float(w) for w in simulate(spec, loss, step, **signals)]
    got = [w / len(weights) for w in weights] if share else weights
    if len(got) != len(expect):
        msg = f"{len(expect)} weights are expected for {len(got)} units"
        raise AssertionError(msg)
    off = [a - float(b) for a, b in zip(got, expect, strict=True)]
    if all(abs(x) <= atol for x in off):
        return
    losses = [float(x) for x in loss] if loss is not None else [math.nan] * len(got)
    largest = max(off, key=lambda x: abs(x) if x == x else math.inf)  # noqa: PLR0124 - NaN
    lines = [
        f"the weights of {spec} at step {step} are off by up to {abs(largest):.2g} (atol {atol:g})",
        f"  {'unit':>4}  {'loss':>10}  {'got':>12}  {'expected':>12}  {'difference':>10}",
    ]
    rows = zip(losses, got, expect, off, strict=True)
    lines += [
        f"  {i:>4}  {x:>10.5g}  {a:>12.7f}  {b:>12.7f}  {d:>+10.2g}"
        f"{'' if abs(d) <= atol else '  <'}"
        for i, (x, a, b, d) in enumerate(rows)
    ]
    raise AssertionError("\n".join(lines))
