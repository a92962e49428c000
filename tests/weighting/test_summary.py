"""What a run came to, in a few lines."""

import json
import math

from weighting.runs.files import Lines, read_lines
from weighting.runs.summary import summary


def lines(tmp_path, **columns):
    """Return lines of metrics at every second step, of a column each."""
    path = tmp_path / "metrics.jsonl"
    count = len(next(iter(columns.values())))
    rows = [{"step": 2 * i + 2, **{k: v[i] for k, v in columns.items()}} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_lines(path)


def row(text, label):
    """Return the cells of a row."""
    [found] = [line for line in text.splitlines() if line.startswith(label)]
    return found.removeprefix(label).split()


def test_each_number_is_told_over_the_whole_run(tmp_path):
    """First, last, minimum, mean and maximum."""
    text = summary(lines(tmp_path, unweighted_loss=[4.0, 1.0, 2.0, 5.0], tps=[1000.0] * 4))

    assert row(text, "loss (nats)") == ["4.0000", "5.0000", "1.0000", "3.0000", "5.0000"]
    assert row(text, "tokens per second") == ["1,000"] * 5
    assert row(text, "largest weight (mean 1)") == ["nan"] * 5
    assert "steps logged: 4, from 2 to 8" in text


def test_what_is_not_finite_is_shown_where_it_is_and_left_out_of_the_mean(tmp_path):
    """A last loss that is NaN is not hidden, nor does it hide the others."""
    text = summary(lines(tmp_path, unweighted_loss=[4.0, 2.0, math.nan]))

    assert row(text, "loss (nats)") == ["4.0000", "nan", "2.0000", "3.0000", "4.0000"]


def test_steps_at_the_cap_are_told_as_stretches_of_logged_steps(tmp_path):
    """The largest share among the factors counts; that of the final weights is none of theirs."""
    a = [0.0, 0.5, 0.25, 0.0, 0.0]
    b = [0.0, 0.0, 0.5, 0.0, 0.125]
    columns = {"a/capped_frac": a, "b/capped_frac": b, "weight/capped_frac": [1.0] * 5}
    text = summary(lines(tmp_path, **columns))

    assert row(text, "share at the cap") == ["0.000", "0.125", "0.000", "0.225", "0.500"]
    assert text.endswith("a cap held weights down at 3 of these: 4-6, 10")


def test_many_stretches_are_cut_and_none_is_said(tmp_path):
    """A run whose cap binds now and then stays a line; one without says so."""
    now_and_then = summary(lines(tmp_path, **{"a/capped_frac": [0.5, 0.0] * 8}))

    assert now_and_then.endswith("at 8 of these: 2, 6, 10, 14, 18, 22, ...")
    assert summary(lines(tmp_path, tps=[1.0])).endswith("no cap held a weight down")
    assert summary(Lines()) == "no steps were logged"
