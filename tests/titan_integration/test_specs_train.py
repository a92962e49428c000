"""Every shipped spec trains the real trainer, on data with the columns and domains it reads."""

import json
import math
import random

import pytest
from generators import BURN_IN
from runs import HERE, SMALL, torchrun

import weighting as wt
from weighting.build import plan_of
from weighting.language.find import shipped
from weighting.stages import Table

pytestmark = pytest.mark.processes

ONES = {
    "ado",
    "uniform",
    "uniform-domains",
    "odm",
    "odm-validation",
    "dynamic-loading",
    "doge-proxy",
    "velocitune",
    "doge-table",
    "doremi-table",
}
"""Specs whose weights of the loss do not differ, by intention: they draw, or weigh gradients."""
NO_GAIN = {"ukpl", "longce"}
"""Specs whose short context is longer than these sequences, which therefore weigh all alike."""
AT_CAP = {"iw-sft"}
"""Specs that weigh by a gain over a reference, which all tokens soon pass by more than a cap."""
SLOW = {"toremi"} | BURN_IN
"""Specs that move their weights after more than five steps."""


def domains_of(name):
    """Return the domains a spec's table names, or the built-in text's."""
    tables = [s for p in wt.load(name).factors.values() for s in p if isinstance(s, Table)]
    return (
        tuple(sorted(tables[0].weights)) if tables else ("code", "data", "docs", "tables", "tests")
    )


def write_data(path, domains):
    """Write documents of every domain with the columns the specs read."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    with path.open("w") as file:
        for i in range(120):
            domain = domains[i % len(domains)]
            text = " ".join(rng.choices(words, k=60 + 10 * (i % 7)))
            more = {"ref_loss": 6 + rng.random() * 2, "weight": rng.random() * 3, "topics": i % 4}
            more |= {"keep": 1 if i % 8 else -1}
            more |= {"label_count": 1 + i % 9, "ref_loss_base": 6 + i % 5, "ref_loss_better": 6}
            file.write(json.dumps({"text": text, "domain": domain, **more}) + "\n")


def rows_of(name):
    """Return what rows a spec asks of the loader."""
    plan = plan_of(wt.load(name))
    return "turns" if "gradients" in plan.listens_to else "drawn" if plan.sampling else "mixed"


GROUPS = {}
for _name in shipped():
    GROUPS.setdefault((domains_of(_name), rows_of(_name)), []).append(_name)


def test_every_spec_is_in_a_group():
    """No spec is forgotten."""
    assert sum(map(len, GROUPS.values())) == len(shipped()) >= 34


@pytest.mark.parametrize(("domains", "rows"), GROUPS)
def test_every_spec_trains_five_steps(domains, rows, tmp_path):
    """Five steps with each spec give finite losses, and weights that say something."""
    names = GROUPS[domains, rows]
    write_data(tmp_path / "data.jsonl", domains)
    flags = ["--module=faulty", "--config=tiny", "--weighting.spec=uniform"]
    flags += [f"--dataloader.dataset_path={tmp_path / 'data.jsonl'}", f"--dump_folder={tmp_path}"]
    flags += [f"--dataloader.rows={rows}", "--debug.seed=1"]
    flags += [*SMALL, "--training.local_batch_size=8", "--training.steps=1000"]
    out = tmp_path / "found.json"
    driver = str(HERE / "train_specs.py")
    done = torchrun(1, driver, str(out), *names, "--", *flags, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    found = json.loads(out.read_text())
    assert sorted(found) == sorted(names)
    for name, run in found.items():
        assert len(run["losses"]) == 5, name
        assert all(map(math.isfinite, run["losses"])), name
    alike = {name for name, run in found.items() if run["max"] - run["min"] < 1e-6}
    assert alike == (ONES | NO_GAIN | SLOW | AT_CAP) & found.keys()
