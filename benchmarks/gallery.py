"""Write specs/README.md, the gallery of shipped specs, and the little picture of each.

    python benchmarks/gallery.py specs

Everything is taken from the spec files: the header for formula, paper and differences, the built
pipeline for level, signals and cost, a simulation for the picture.
"""

import sys
from pathlib import Path

import torch

import weighting as wt
from weighting.build import Plan, plan_of
from weighting.loss.path import LLAMA3_8B, matrix_products, path_of
from weighting.simulate import written_domains
from weighting.spec import arrow_text

WIDTH, HEIGHT, TOP = 240, 120, 4.0
_COSTS = {
    "ref_loss": "a forward pass of the reference model, unless the loss is a data column",
    "columns.short_loss_": "a second forward pass, on the short context",
}
_NEWS = {
    "gradients": "a gradient for each domain, in turns",
    "validation": "a validation with text of every domain now and then",
}


def main(folder: Path) -> None:
    """Write the gallery of a folder of specs into it."""
    pictures = folder / "curves"
    pictures.mkdir(exist_ok=True)
    entries = []
    for path in sorted(folder.glob("*.yaml")):
        spec = wt.load(path)
        (pictures / f"{spec.name}.svg").write_text(picture(spec), encoding="utf-8")
        entries.append(entry(path, spec))
    text = "\n\n".join([_HEAD, *entries]) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


_HEAD = """# Gallery

Written by `python benchmarks/gallery.py specs`; edit the spec files, not this page.

Each picture shows the weight (mean one, grey line at 1, dashed at 2) over a batch of 129 sequences
of one token whose loss runs from 1 to 5 nats; the entropy runs with the loss, the label's
probability is exp(-loss), the reference loss is 3 nats throughout, the short-context loss half a
nat more than half the loss, a data column runs from 0 to 4 (one of topics through sets of them,
`keep` from -2 to 2), and the domains follow one another from low losses to high ones.  Where a spec
works inside each sequence, the 129 tokens are one.
Costs are those of one sequence of 8,192 tokens through the output layer of Llama 3 8B, beside plain
training, whose loss takes 3 products of the output layer: of hidden states, of their gradient and
of the layer's.  `late` keeps nothing; `keep` the logits; `recompute` makes them twice.
What only draws data is a flat line at 1, and so is what waits to be told of gradients.
Schedules are shown at their last step, stages that remember after 200 such batches."""


def entry(path: Path, spec: wt.Spec) -> str:
    """Return the section of one spec."""
    title, formula, paper, differs = header(path.read_text(encoding="utf-8"))
    plan = plan_of(spec)
    pipelines = "\n".join(
        f"    {'' if len(spec.factors) == 1 else name + ': '}{arrow_text(pipeline)}"
        for name, pipeline in spec.factors.items()
    )
    return "\n".join(
        [
            f"## {spec.name}",
            "",
            f"![weight against loss](curves/{spec.name}.svg)",
            "",
            f"{title}",
            "",
            pipelines,
            "",
            formula,
            "",
            f"- Weighs: per {level(plan)}.  Reads: {', '.join(sorted(plan.needs)) or 'nothing'}.",
            *acts(plan),
            f"- Costs: {cost(plan)}.",
            f"- Paper: {paper}",
            f"- Differs{differs if differs.startswith(':') else ' ' + differs}",
        ]
    )


def level(plan: Plan) -> str:
    """Return the units that are weighed, factor by factor."""
    levels = (
        "domain"
        if plan.targets[name] == "sampling" or "domain_ids" in steps[0].stage.reads()
        else steps[-1].level
        for name, steps in plan.factors.items()
    )
    return " x ".join(dict.fromkeys(levels))


def acts(plan: Plan) -> list[str]:
    """Return a line on what draws and what multiplies, if anything draws."""
    if not plan.sampling:
        return []
    names = {name: name if len(plan.factors) > 1 else "the weights" for name in plan.factors}
    multiplied = [
        names[name] if where == "loss" else f"{names[name]} / share drawn"
        for name, where in plan.targets.items()
        if where != "sampling"
    ]
    drawn = " x ".join(names[name] for name in plan.sampling)
    return [f"- Draws by: {drawn}.  Multiplies the loss by: {' x '.join(multiplied) or 'nothing'}."]


def header(text: str) -> tuple[str, str, str, str]:
    """Return title, formula block, paper and differences from a spec's header."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("#")]
    at = next(i for i, line in enumerate(lines) if line.startswith("Paper:"))
    body = "\n".join(lines[at:])
    formula = "\n".join(f"    {line.strip()}" for line in lines[1:at] if line.startswith("  "))
    paper, _, differs = body.removeprefix("Paper:").partition("\nDiffers")
    assert formula, f"{lines[0]}: no formula in the header"
    assert differs, f"{lines[0]}: no Differs in the header"
    return lines[0].strip(), formula, " ".join(paper.split()), " ".join(differs.split())


def cost(plan: Plan) -> str:
    """Return what a spec costs beside plain training, in words."""
    found = [] if plan.identity else [path_in_words(plan)]
    found += [text for name, text in _COSTS.items() if any(n.startswith(name) for n in plan.needs)]
    found += [_NEWS[news] for news in sorted(plan.listens_to)]
    return "; ".join(found) or "nothing"


def path_in_words(plan: Plan) -> str:
    """Return the way through the output layer of Llama 3 8B, and what it takes."""
    path = path_of(plan, LLAMA3_8B)
    products = matrix_products(path.memory, plan.max_active_fraction())
    return f"`{path.memory}`, {products:g} products of the output layer"


def picture(spec: wt.Spec) -> str:
    """Return a small SVG of weight against loss."""
    loss, weight = curve(spec)
    high = max(2.2, min(TOP, weight.max().item() * 1.05))
    low = min(0, max(-TOP, weight.min().item() * 1.05))
    x = (loss - 1) / 4 * (WIDTH - 40) + 30
    y = HEIGHT - 24 - (weight.clamp(low, high) - low) / (high - low) * (HEIGHT - 36)
    order = loss.argsort(stable=True)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[order], y[order], strict=True))
    marks = torch.tensor([1.0, 2.0, 0.0]) - low
    line = (HEIGHT - 24 - marks / (high - low) * (HEIGHT - 36)).tolist()
    zero = f'<path d="M30 {line[2]:.1f}H{WIDTH - 10}" stroke="#555"/>\n' if low < 0 else ""
    if zero:
        zero += f'<text x="26" y="{line[2] + 3:.1f}" text-anchor="end">0</text>\n'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="9" fill="#555">
<title>{spec.name}: weight against loss</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<path d="M30 {line[0]:.1f}H{WIDTH - 10}" stroke="#bbb"/>
<path d="M30 {line[1]:.1f}H{WIDTH - 10}" stroke="#bbb" stroke-dasharray="3 3"/>
<path d="M30 12V{HEIGHT - 24}H{WIDTH - 10}" stroke="#555" fill="none"/>
<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.6"/>
<text x="26" y="{line[0] + 3:.1f}" text-anchor="end">1</text>
<text x="26" y="{line[1] + 3:.1f}" text-anchor="end">2</text>
<text x="30" y="{HEIGHT - 13}">1</text>
<text x="{WIDTH - 10}" y="{HEIGHT - 13}" text-anchor="end">5</text>
<text x="{WIDTH // 2 + 10}" y="{HEIGHT - 4}" text-anchor="middle">loss (nats)</text>
{zero}<text x="4" y="9">weight</text>
</svg>
"""


def curve(spec: wt.Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses and the weights a spec gives them, both [129]."""
    loss = torch.linspace(1, 5, 129)[:, None]
    domains = [*written_domains(spec)] or ["a", "b"]
    fn = wt.build(spec, domains=domains)
    p = (-loss).exp()
    columns = {n.removeprefix("columns."): loss - 1 for n in fn.needs if n.startswith("columns.")}
    columns |= {n: 0.5 * loss + 0.5 for n in columns if n.startswith("short_loss")}
    columns |= {n: loss - 3 for n in columns if n == "keep"}
    columns |= {n: (loss < 2.5).float() for n in columns if n == "label_is_top"}  # noqa: PLR2004
    columns |= {n: (loss * 50).floor() for n in columns if n in {"topics", "example"}}
    columns |= {n: loss * 0.6 for n in columns if n.startswith("topk_entropy")}
    signals = wt.Signals(
        loss=loss,
        entropy=loss,
        target_prob=p,
        error_norm=(1 - 2 * p + p * p).sqrt(),
        ref_loss=torch.full_like(loss, 3.0),
        domain_ids=torch.arange(129)[:, None] * len(domains) // 129,
        segment_ids=torch.zeros_like(loss, dtype=torch.long),
        columns=columns,
    )
    if any(
        step.stage.inside() == "sequence" for steps in fn.plan.factors.values() for step in steps
    ):
        signals = one_row(signals)
    for _ in range(200 if fn.state_dict() else 1):
        out = fn(signals, 10**6)
    return loss[:, 0], out.token.flatten()


def one_row(signals: wt.Signals) -> wt.Signals:
    """Return the tokens of many sequences of one as one sequence of many."""
    values = {
        name: {column: x.T for column, x in value.items()} if name == "columns" else value.T
        for name, value in vars(signals).items()
        if value is not None
    }
    return wt.Signals(**values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
