"""`weighting simulate`: what it prints is what a spec does, and it fits a terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import for_each

import weighting as wt
from weighting.build import plan_of
from weighting.cli import main
from weighting.language.find import shipped
from weighting.runs.loss_files import recorded
from weighting.simulate import columns_of, simulate_units, written_domains

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments):
    """Return what the command did."""
    return click.testing.CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def printed(*arguments):
    """Return the lines of a command that ends well, and fits a terminal."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def table(lines, heading):
    """Return the numbers of the rows below a heading, bars left out."""
    at = next(i for i, line in enumerate(lines) if line.split()[: len(heading)] == heading)
    rows = []
    for line in lines[at + 1 :]:
        if not line:
            break
        rows.append([float(word) for word in line.split() if re.match(r"-?\d", word)])
    return rows


def close(shown, value):
    """Tell whether a printed number is a value: to four decimals, or to three digits."""
    return abs(shown - value) <= 5.1e-5 or shown == pytest.approx(value, rel=5.1e-3)


def written(path, units):
    """Write units as lines of JSON and return the path."""
    path.write_text("".join(json.dumps(unit) + "\n" for unit in units))
    return path


UNITS = [
    {"loss": 2.5, "entropy": 2.0, "domain": "web"},
    {"loss": 0.5, "entropy": 1.0, "domain": "code"},
    {"loss": 4.0, "entropy": 3.5, "domain": "web"},
    {"loss": 3.0, "entropy": 1.5, "domain": "code"},
    {"loss": 1.0, "entropy": 2.5, "domain": "docs"},
]

ALONE = """\
4 losses of "1,2,3,5", each a sequence of one token
step 1, no number changes over the run

     loss  linupper
   1.0000     0.1386 ████▊
   2.0000     0.4838 ████████████████▋
   3.0000     1.6888 ██████████████████████████████████████████████████████████
   5.0000     1.6888 ██████████████████████████████████████████████████████████

      min     0.1386
     mean     1.0000
      max     1.6888
    ESS/n     0.6715
   at cap     0.0000
"""

BESIDE = """\
5 losses of units.jsonl, each a sequence of one token
step 1001, the last change of pipeline.interpolate.lam in linupper-gpt2

     loss  linupper-gpt2          mile                   table(web=1, code=3…
   0.5000     0.1263 ▉               0.6452 ████▎           1.5000 █████████▊
   1.0000     0.2580 █▋              1.1290 ███████▍        1.0000 ██████▌
   2.5000     1.5386 ██████████      0.9677 ██████▎         0.5000 ███▎
   3.0000     1.5386 ██████████      0.8065 █████▎          1.5000 █████████▊
   4.0000     1.5386 ██████████      1.4516 █████████▍      0.5000 ███▎

      min     0.1263                 0.6452                 0.5000
     mean     1.0000                 1.0000                 1.0000
      max     1.5386                 1.4516                 1.5000
    ESS/n     0.6960                 0.9285                 0.8333
   at cap     0.0000                      -                      -

the tenth that weighs most, ties included: 3 by linupper-gpt2
  against it                               units  losses
  mile                              stay       1  4.0000
                                   leave       2  2.5000 to 3.0000
                                    join       0
  table(web=1, code=3, docs=2) ->…  stay       1  3.0000
                                   leave       2  2.5000 to 4.0000
                                    join       1  0.5000

mean weight of each domain
domain                linupper-gpt2       mile                table(web=1, cod…
code                     0.8324 ███▊         0.7258 ███▎         1.5000 ██████▉
docs                     0.2580 █▏           1.1290 █████▏       1.0000 ████▌
web                      1.5386 ███████      1.2097 █████▌       0.5000 ██▎

uniform-domains draws data by domain, and leaves the loss alone
domain                proportion
code                     0.3333 ███████████████████████████████████████████████
docs                     0.3333 ███████████████████████████████████████████████
web                      0.3333 ███████████████████████████████████████████████

             linupper-gpt2                 mile
      step   ESS/n       max    at cap     ESS/n       max    at cap
         0  1.0000    1.0000    0.0000    0.9285    1.4516         -
       500  1.0000    1.0000    0.0000    0.9285    1.4516         -
      1000  1.0000    1.0000    0.0000    0.9285    1.4516         -
      1001  0.6960    1.5386    0.0000    0.9285    1.4516         -
      1500  0.6960    1.5386    0.0000    0.9285    1.4516         -
      2000  0.6960    1.5386    0.0000    0.9285    1.4516         -

             table(web=1, code=3, doc…
      step   ESS/n       max    at cap
         0  0.8333    1.5000         -
       500  0.8333    1.5000         -
      1000  0.8333    1.5000         -
      1001  0.8333    1.5000         -
      1500  0.8333    1.5000         -
      2000  0.8333    1.5000         -
"""


def test_one_spec_as_people_see_it():
    """A spec on four losses: every weight with its bar, and the statistics."""
    assert run("linupper", "--losses", "1,2,3,5").output == ALONE


def test_specs_side_by_side_as_people_see_them(tmp_path, monkeypatch):
    """Four specs on one file: columns, who moves in the top tenth, domains, draws, and a run."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "units.jsonl", UNITS)
    others = ["mile", "table(web=1, code=3, docs=2) -> mean_one", "uniform-domains"]
    arguments = ["--losses", "units.jsonl", "--over", "0:2000"]
    done = run("linupper-gpt2", *arguments, "--compare", *others)
    assert done.output == BESIDE
    printed("linupper-gpt2", *arguments, "--compare", *others)
    each = [word for other in others for word in ("--compare", other)]
    assert run("linupper-gpt2", *arguments, *each).output == BESIDE


@pytest.mark.slow
@given(
    loss=st.lists(st.floats(0, 30, width=32), min_size=1, max_size=20),
    spec=st.sampled_from(["linupper", "prop1", "focal", "dro-kl", "rgd", "cvar", "uniform"]),
)
def test_printed_weights_are_those_of_simulate(loss, spec):
    """Up to twenty losses: each weight, lowest loss first, and what is said of them all."""
    lines = printed(spec, "--losses", ",".join(map(str, loss)))
    weight = wt.simulate(spec, loss, 1)
    order = torch.tensor(loss).argsort(stable=True)
    rows = table(lines, ["loss"])
    assert len(rows) == len(loss)
    for (shown_loss, shown), i in zip(rows, order.tolist(), strict=True):
        assert close(shown_loss, loss[i])
        assert close(shown, weight[i].item())
    said = {line.split()[0]: line.split()[1] for line in lines[-5:-1]}
    assert close(float(said["min"]), weight.min().item())
    assert close(float(said["mean"]), weight.mean().item())
    assert close(float(said["max"]), weight.max().item())
    ess = weight.sum() ** 2 / (len(loss) * (weight * weight).sum())
    assert float(said["ESS/n"]) == pytest.approx(ess.item(), abs=1e-4)


def test_many_losses_are_shown_in_twentieths():
    """Fifty losses: the mean weight of each twentieth, and quantiles of the weights."""
    loss = (torch.arange(50) ** 2 / 300).flip(0)
    lines = printed("prop1", "--losses", ",".join(map(str, loss.tolist())))
    weight = wt.simulate("prop1", loss, 1)
    groups = loss.argsort().tensor_split(20)
    for (low, high, shown), group in zip(table(lines, ["loss", "from"]), groups, strict=True):
        assert close(low, loss[group].min().item())
        assert close(high, loss[group].max().item())
        assert close(shown, weight[group].mean().item())
    said = {line[:19].strip(): float(line.split()[-1]) for line in lines[-8:]}
    for q in (10, 50, 90):
        assert close(said[f"{q} %"], torch.quantile(weight, q / 100).item())
    assert said["at cap"] == pytest.approx((weight > 2 - 1e-4).float().mean().item(), abs=1e-4)
    assert said["at cap"] > 0, "the cap binds here"


def test_the_longest_bar_is_the_highest_weight():
    """Bars are as long as their weights, to an eighth of a character, in all columns alike."""
    lines = printed("linupper", "--losses", "1,2,3,5", "--compare", "prop1")
    rows = [line for line in lines if "█" in line]
    eighths = " ▏▎▍▌▋▊▉█"
    lengths = []
    for row in rows:
        for cell in (row[9:44], row[44:]):
            bar = sum(eighths.index(c) for c in cell if c in eighths[1:])
            lengths.append((bar, float(cell.split()[0])))
    longest = max(lengths)
    assert longest[1] == 2.0
    for bar, weight in lengths:
        assert bar == pytest.approx(longest[0] * weight / 2, abs=0.51)


def complete(spec, path):
    """Write sixteen units with all that a spec reads; return them and the path."""
    domains = [*written_domains(spec)] or ["a", "b"]
    columns = set(columns_of(plan_of(spec)).values()) - {"domain"}
    g = torch.Generator().manual_seed(0)
    values = {name: torch.rand(16, generator=g) * 4 for name in sorted(columns | {"loss"})}
    if "target_prob" in values:
        values["target_prob"] /= 4
    units = [
        {name: x[i].item() for name, x in values.items()} | {"domain": domains[i % len(domains)]}
        for i in range(16)
    ]
    return units, written(path, units)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_every_shipped_spec_simulates(name, tmp_path):
    """With all columns it reads, a spec's printed weights are those of its units."""
    spec = wt.load(name)
    units, path = complete(spec, tmp_path / "units.jsonl")
    lines = printed(name, "--losses", path, "--over", "0:20000")
    plan = plan_of(spec)
    step = int(re.match(r"step (\d+)", lines[1])[1])
    if {*plan.targets.values()} == {"sampling"}:
        assert f"{name} draws data by domain, and leaves the loss alone" in lines
        assert not any("ESS/n" in line for line in lines)
        return
    given = {
        signal: [unit[column] for unit in units]
        for signal, column in columns_of(plan).items()
        if signal != "domain_ids"
    }
    given.setdefault("loss", [unit["loss"] for unit in units])
    domain = [unit["domain"] for unit in units]
    weight = simulate_units(spec, given, step, domain=domain).weight
    order = torch.tensor([unit["loss"] for unit in units]).argsort(stable=True)
    shown = [row[1] for row in table(lines, ["loss"])]
    assert all(close(x, y) for x, y in zip(shown, weight[order].tolist(), strict=True))


@pytest.mark.slow
@for_each("name", shipped())
def test_every_shipped_spec_weighs_bare_losses_or_says_what_it_needs(name):
    """On losses alone a spec weighs them, or one line names it, its columns, and what there is."""
    done = run(name, "--losses", "1,2,3,5")
    plan = plan_of(wt.load(name))
    lacking = [c for s, c in columns_of(plan).items() if s not in {"loss", "target_prob"}]
    if not lacking:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 2
    it = "it" if len(lacking) == 1 else "them"
    assert done.output == (
        f'{name} reads {", ".join(lacking)}, and "1,2,3,5" has loss; '
        f"give a file with {it}, a value for each unit\n"
    )


def test_all_specs_that_lack_a_column_are_told_at_once():
    """Comparing, every spec that cannot be simulated has its line."""
    done = run("linupper", "--losses", "1,2", "--compare", "mile", "rho-1")
    assert done.exit_code == 2
    assert [line.split()[0] for line in done.output.splitlines()] == ["mile", "rho-1"]


def test_the_step_is_the_last_change_unless_it_is_given():
    """A step schedule is read after its step, or where --step says."""
    spec = "normalize -> temperature(step(100, 0.4, at=500))"
    for arguments, step in (([], 500), (["--step", 499], 499)):
        lines = printed(spec, "--losses", "1,2,3,5", *arguments)
        assert lines[1].startswith(f"step {step}, ")
        shown = [row[1] for row in table(lines, ["loss"])]
        expected = wt.simulate(spec, [1, 2, 3, 5], step).tolist()
        assert all(close(x, y) for x, y in zip(shown, expected, strict=True))


def test_over_a_run_shows_what_changes():
    """The steps hold the run's ends and the jump; each row is what simulate gives there."""
    spec = "normalize -> temperature(step(100, 0.4, at=500)) -> clamp(1.5)"
    loss = [1.0, 2.0, 3.0, 5.0]
    rows = table(printed(spec, "--losses", "1,2,3,5", "--over", "0:2000"), ["step", "ESS/n"])
    assert [int(row[0]) for row in rows] == [0, 499, 500, 1000, 1500, 2000]
    for step, ess, largest, capped in rows:
        weight = wt.simulate(spec, loss, int(step))
        share = weight.sum() ** 2 / (4 * (weight * weight).sum())
        assert ess == pytest.approx(share.item(), abs=1e-4)
        assert close(largest, weight.max().item())
        assert capped == pytest.approx((weight > 1.5 - 1e-4).float().mean().item(), abs=1e-4)
    assert rows[0][3] == 0 < rows[-1][3], "the cap binds after the jump, not before"
    constant = table(printed("linupper", "--losses", "1,2", "--over", "1:9"), ["step", "ESS/n"])
    assert [int(row[0]) for row in constant] == [*range(1, 10)]


def test_units_of_one_step_are_one_batch(tmp_path):
    """With a column step, --step takes a batch, and --over those that were recorded."""
    units = [{"loss": float(i), "step": 10 * (i % 3)} for i in range(9)]
    path = written(tmp_path / "run.jsonl", units)
    lines = printed("linupper", "--losses", path)
    assert lines[1] == "step 20, the last that was recorded"
    shown = [row[1] for row in table(lines, ["loss"])]
    expected = wt.simulate("linupper", [2, 5, 8]).tolist()
    assert all(close(x, y) for x, y in zip(shown, expected, strict=True))
    assert [row[0] for row in table(printed("linupper", "--losses", path, "--step", 10), ["loss"])]
    over = table(printed("linupper", "--losses", path, "--over", "5:25"), ["step", "ESS/n"])
    assert [int(row[0]) for row in over] == [10, 20]

    done = run("linupper", "--losses", path, "--step", 11)
    assert done.exit_code == 2
    assert done.output == f"{path}: nothing was recorded at step 11, but at 0, 10, 20\n"
    done = run("linupper", "--losses", path, "--over", "30:50")
    assert done.output == f"{path}: nothing from step 30 to 50, but from 0 to 20\n"


def test_bare_losses_are_refused_for_a_selection_within_sequences(tmp_path):
    """A selection inside each sequence needs tokens beside each other, and says so."""
    units = [{"loss": float(i), "ref_loss": 2.0} for i in range(10)]
    path = written(tmp_path / "tokens.jsonl", units)
    apart = printed("sstoken", "--losses", path)
    assert {row[1] for row in table(apart, ["loss"])} == {1.0}
    note = "sstoken works inside each sequence, and each is one token here; see --per token"
    assert note in apart
    together = printed("sstoken", "--losses", path, "--per", "token")
    assert note not in together
    kept = [row[1] > 0 for row in table(together, ["loss"])]
    assert kept == [True] * 6 + [False] * 4, "an older model found the lowest losses harder"
    assert "linupper weighs sequences, and all losses are one here" in printed(
        "linupper", "--losses", path, "--per", "token"
    )


def test_the_share_of_the_top_tenth_is_what_a_hand_counts():
    """Of twenty losses two are in the top tenth; weights turned round put the lowest two there."""
    loss = ",".join(str(x) for x in range(20))
    turned = "affine(-1, 20) -> mean_one"
    lines = printed("loss -> mean_one", "--losses", loss, "--compare", turned, "cvar")
    at = next(i for i, line in enumerate(lines) if line.startswith("the tenth"))
    assert lines[at].endswith("2 by loss -> mean_one")
    assert [line.split()[-5:] for line in lines[at + 2 : at + 8]] == [
        [*turned.split()[-3:], "stay", "0"],
        ["leave", "2", "18.0000", "to", "19.0000"],
        ["join", "2", "0.0000", "to", "1.0000"],
        ["stay", "2", "18.0000", "to", "19.0000"],
        ["leave", "0"],
        ["join", "0"],
    ]


def test_a_batch_may_lack_some_of_a_tables_domains(tmp_path):
    """A recorded batch with two of five domains is weighed; one the table lacks is refused."""
    units = [{"loss": 1.0, "domain": "code"}, {"loss": 2.0, "domain": "docs"}]
    path = written(tmp_path / "units.jsonl", units)
    lines = printed("table(code=1, docs=3, web=1) -> mean_one", "--losses", path)
    assert [row[1] for row in table(lines, ["loss"])] == [0.5, 1.5]
    written(path, [*units, {"loss": 1.0, "domain": "news"}])
    done = run("table(code=1, docs=3, web=1) -> mean_one", "--losses", path)
    assert done.exit_code == 2
    assert "the data has no domain 'web'" in done.output


def test_what_only_draws_says_so_without_domains_too():
    """Where neither spec nor file names domains there are no proportions, and a line says why."""
    lines = printed("uniform-domains", "--losses", "1,2")
    assert lines[-2:] == [
        "uniform-domains draws data by domain, and leaves the loss alone;",
        "a column domain tells of which domains, and the proportions",
    ]


def test_names_that_would_look_alike_are_numbered():
    """Arrow texts that begin alike get numbers and are given in full."""
    first, second = (f"normalize -> linupper(alpha=1) -> temperature({x})" for x in (0.4, 0.5))
    lines = printed(first, "--losses", "1,2,3", "--compare", second)
    assert lines[2:4] == [f"1: {first}", f"2: {second}"]
    assert re.search(r"1: normalize .*…   *2: normalize .*…", lines[5])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_says_where_it_is_wrong(suffix, tmp_path):
    """Values that are no finite numbers are found, with line or row."""
    for value, words in (
        ("high", 'loss is "high"; it must be one number'),
        ([1.0, 2.0], "loss is [1.0, 2.0]; it must be one number"),
        (True, "loss is True; it must be one number"),
        (float("nan"), "loss is nan; it must be finite, within float32"),
        (1e39, "loss is 1e+39; it must be finite, within float32"),
        (None, "loss is missing here, and other lines have it"),
    ):
        path = tmp_path / f"units.{suffix}"
        if suffix == "jsonl":
            written(path, [{"loss": 1.0}, {"loss": value}])
            place = f"{path}:2"
        elif isinstance(value, float) or value is None:
            pq.write_table(pa.table({"loss": pa.array([1.0, value], pa.float64())}), path)
            place = f"{path}: row 2"
        else:
            pq.write_table(pa.table({"loss": [value]}), path)
            place = f"{path}: row 1"
        done = run("linupper", "--losses", path)
        assert (done.exit_code, done.output) == (2, f"{place}: {words}\n")


EXAMPLE = 'write an object such as {"loss": 2.5}'
WRONG = {
    "none.jsonl": ("\n\n", ': no losses in it; every line is a unit, such as {"loss": 2.5}'),
    "other.jsonl": (
        '{"nll": 1.0, "domain": "a"}\n',
        ": no column loss, in nats; it has nll, domain",
    ),
    "bare.jsonl": ("1.5\n", ':1: 1.5 is no unit; write an object such as {"loss": 2.5}'),
    "cut.jsonl": (
        '{"loss": 1.0}\n{"loss": 2',
        ":2: not JSON (Expecting ',' delimiter: line 1 column 11 (char 10)); " + EXAMPLE,
    ),
    "junk.parquet": ("junk", ": cannot be read as parquet ("),  # the rest is pyarrow's
    "units.csv": ("loss\n1\n", ": cannot read .csv; give a file that ends in .jsonl or .parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used(name, tmp_path):
    """Empty, foreign, cut-off and unknown files end the command with one line."""
    text, message = WRONG[name]
    (tmp_path / name).write_text(text)
    done = run("linupper", "--losses", tmp_path / name)
    assert done.exit_code == 2
    shown = done.output.partition(message)
    assert shown[:2] == (f"{tmp_path / name}", message)
    assert shown[2] == "\n" or name == "junk.parquet"
    assert done.output.count("\n") == 1


NO_FILE = 'give a .jsonl or .parquet file, or numbers such as "1,2,3,5"'


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("1,2,x", "1,2,x: 'x', at place 3, is no number"),
        ("1,,2", "1,,2: '', at place 2, is no number"),
        ("1,inf", "1,inf: number 2: loss is inf; it must be finite, within float32"),
        ("nothing.jsonl", f"nothing.jsonl: no such file; {NO_FILE}"),
        (".", f".: is a directory; {NO_FILE}"),
    ],
)
def test_losses_that_are_neither_numbers_nor_a_file(losses, message):
    """What was meant is told apart, and each has its line."""
    done = run("linupper", "--losses", losses)
    assert (done.exit_code, done.output) == (2, f"{message}\n")


def test_a_line_without_a_column_that_others_have(tmp_path):
    """A column that is missing in one line only is told with this line."""
    path = written(tmp_path / "u.jsonl", [{"loss": 1.0, "entropy": 1.0}, {"loss": 2.0}])
    done = run("mile", "--losses", path)
    assert done.output == f"{path}:2: entropy is missing here, and other lines have it\n"
    assert printed("linupper", "--losses", path), "which is nothing to a spec that does not read it"


@pytest.mark.parametrize("over", ["5", "9:3", "a:b", "0:", "-1:4"])
def test_a_run_that_is_none_is_a_usage_error(over):
    """--over wants two steps, the first before the last."""
    done = run("linupper", "--losses", "1,2", "--over", over)
    assert done.exit_code == 2
    assert "write its first and last step, as in 0:20000" in " ".join(done.output.split())


def test_parquet_is_read_as_json_lines_are(tmp_path):
    """The same units in either file print the same, but for the name; a record's columns too."""
    written(tmp_path / "u.jsonl", UNITS)
    columns = {name: [unit[name] for unit in UNITS] for name in UNITS[0]}
    pq.write_table(pa.table(columns), tmp_path / "u.parquet")
    out = [
        printed("linupper-x-mile", "--losses", tmp_path / name)[1:]
        for name in ("u.jsonl", "u.parquet")
    ]
    assert out[0] == out[1]
    # A run's own record names columns as signals do, and has an empty domain where there is none.
    table_ = pa.table({"loss": [1.0], "columns.weight": [0.5], "domain": pa.nulls(1, pa.string())})
    pq.write_table(table_, tmp_path / "r.parquet")
    found = recorded(str(tmp_path / "r.parquet"), ["weight", "domain"])
    assert found.has == ("loss", "weight")
    assert found.numbers("weight") == [0.5]


def test_parquet_without_pyarrow_is_a_line(tmp_path, monkeypatch):
    """The core does without pyarrow, and says what to install; .jsonl needs none."""
    pq.write_table(pa.table({"loss": [1.0]}), tmp_path / "u.parquet")
    written(tmp_path / "u.jsonl", UNITS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = run("linupper", "--losses", tmp_path / "u.parquet")
    advice = "parquet files need pyarrow: pip install pyarrow, or give a .jsonl file"
    assert (done.exit_code, done.output) == (2, f"{tmp_path}/u.parquet: {advice}\n")
    assert printed("linupper", "--losses", tmp_path / "u.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_plain_text(encoding):
    """Piped there are no colours and no cursor codes, and bars that the encoding knows."""
    command = [sys.executable, "-m", "weighting", "simulate", "linupper", "--losses", "1,2,3,5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    env |= {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run([*command], env=env, capture_output=True, check=True)
    assert b"\x1b" not in done.stdout
    if encoding == "utf-8":
        assert done.stdout.decode() == ALONE.replace("\n", os.linesep)
    else:
        assert done.stdout.decode("ascii").count("#") == 4 + 16 + 58 + 58


def test_control_characters_in_a_file_reach_no_terminal(tmp_path):
    """A domain's name that would move the cursor is shown without what moves it."""
    units = [{"loss": 1.0, "domain": "a\x1b[2J\nb"}, {"loss": 2.0, "domain": "c"}]
    lines = printed("group-dro", "--losses", written(tmp_path / "u.jsonl", units))
    assert [line.split()[0] for line in lines[-5:-2]] == ["domain", "a?[2J?b", "c"]
