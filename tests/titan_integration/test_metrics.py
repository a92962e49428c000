"""Metrics files: what is written, read back and shown."""

import io
import json
import math

import pytest
import torch

import weighting as wt
from titan_integration.commands import run_queue as series
from titan_integration.observe import metrics
from titan_integration.state.run import start
from weighting.runs.files import read_lines
from weighting.runs.run_json import about, set_aside


def line(step, **more):
    """Return a line of metrics."""
    found = {
        "unweighted_loss": 2.0,
        "weighted_loss": 2.1,
        "weight/max": 1.5,
        "weight/ess_frac": 0.9,
    }
    return {"step": step, **found, "pipeline/capped_frac": 0.25, **more}


def run_of(spec):
    """Return the run of a spec on one rank."""
    fn = wt.build(wt.loads(spec))
    return start(fn, torch.device("cpu"))


def test_the_last_line_of_a_step_counts_and_a_torn_one_is_left_out(tmp_path):
    """A resumed run's lines replace those of the steps it repeats; half a line is no line."""
    path = tmp_path / "metrics.jsonl"
    lines = [line(1), line(2), line(2, weighted_loss=9.0)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "unw')

    assert [(x["step"], x["weighted_loss"]) for x in read_lines(path)] == [(1, 2.1), (2, 9.0)]


def test_a_file_that_is_not_metrics_is_named_with_its_line(tmp_path):
    """Something else in the middle of the file is an error with its place."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("hello\n" + json.dumps(line(1)) + "\n")

    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a line of metrics"):
        read_lines(path)


def test_an_earlier_file_is_kept_under_the_first_free_name(tmp_path):
    """Setting a file aside never overwrites one set aside before."""
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        path.write_text(str(number))
        assert set_aside(path).name == f"metrics.jsonl.{number}"
    assert (tmp_path / "metrics.jsonl.1").read_text() == "1"


def test_statistics_add_up_over_microbatches():
    """The statistics of a step are those of its microbatches taken together."""
    run = run_of("normalize -> temperature(1) -> clamp(1.2/n)")
    run.begin_step(1)
    seen = []
    for seed in (0, 1):
        loss = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed))
        seen.append(run.weigh({"loss": loss}).token)
        run.statistics.add_losses(loss.mean() / 2, loss.mean())
    found = run.read_statistics()
    assert found["weighted_loss"] == pytest.approx(2 * found["unweighted_loss"])

    tokens = torch.cat(seen)
    assert found["weight/max"] == pytest.approx(tokens.max().item())
    assert found["weight/min"] == pytest.approx(tokens.min().item())
    ess = tokens.sum() ** 2 / (tokens.numel() * (tokens**2).sum())
    assert found["weight/ess_frac"] == pytest.approx(ess.item(), rel=1e-5)  # float32 sums
    capped = (tokens[:, 0] >= 1.2 * (1 - 1e-5)).float().mean().item()
    assert found["pipeline/capped_frac"] == pytest.approx(capped)
    assert capped > 0
    run.begin_step(2)
    assert run.read_statistics()["weight/max"] == 0


def test_batches_of_one_sequence_are_noted_at_the_first_log_step_only():
    """What the spec compares came alone in every batch: that is worth one sentence."""
    alone, together = torch.rand(1, 3), torch.rand(2, 3)
    for batches, noted in (([alone, alone], 1), ([alone, together], 0), ([together], 0)):
        run = run_of("normalize -> temperature(1)")
        run.begin_step(1)
        assert run.statistics.warnings is None
        for loss in batches:
            run.weigh({"loss": loss})
        run.read_statistics()
        assert len(run.statistics.warnings) == noted
        run.weigh({"loss": alone})
        run.read_statistics()
        assert len(run.statistics.warnings) == noted
    assert "every batch so far had only one" in str(run_of_one_sequence().statistics.warnings)


def run_of_one_sequence():
    """Return the run after a log step whose batch had one sequence."""
    run = run_of("normalize -> temperature(1)")
    run.weigh({"loss": torch.rand(1, 3)})
    run.read_statistics()
    return run


@pytest.mark.parametrize("pipeline", ["table(a=2, b=1) -> mean_one", "mean(domain) -> mean_one"])
@pytest.mark.parametrize("ids", [[[0, 0], [0, 0]], [[0, 0], [0, 1]]])
def test_batches_of_one_domain_are_noted(pipeline, ids):
    """A table's weight is scaled away in them, and a domain alone has none to be compared with."""
    fn = wt.build(wt.loads(pipeline), domains=["a", "b"])
    run = start(fn, torch.device("cpu"))
    known = {"domain_ids": torch.tensor(ids), "valid": torch.ones(2, 2, dtype=torch.bool)}
    token = run.weigh({"loss": torch.rand(2, 2), **known}).token
    run.statistics.add_by_domain(torch.rand(2, 2), token, known)
    run.read_statistics()
    one = torch.tensor(ids).sum() == 0
    assert len(run.statistics.warnings) == one
    assert torch.equal(token, torch.ones(2, 2)) == one


def test_a_bad_signal_is_reported_at_the_next_log_step_only():
    """NaN passes through the loss without a word and is an error when statistics are read."""
    run = run_of("mean(sequence) -> temperature(1)")
    loss = torch.ones(2, 3)
    loss[1, 1] = torch.nan
    for step in (1, 2):
        run.begin_step(step)
        out = run.weigh({"loss": loss if step == 1 else torch.ones(2, 3)})
        assert out.token.isfinite().all()
    with pytest.raises(wt.NonFiniteSignalError, match="3 tokens had a NaN or infinite signal"):
        run.read_statistics()
    assert run.read_statistics()["weight/nonfinite_frac"] == 0, "reported once"


class CountingFile(io.FileIO):
    """A file that counts the bytes that are read of it."""

    taken = 0

    def read(self, size=-1):
        """Read and count."""
        found = super().read(size)
        self.taken += len(found)
        return found


@pytest.mark.parametrize("torn", [b"", b'{"step": 7', b"x" * 200_000])
def test_of_a_long_file_only_the_end_is_read(torn, tmp_path):
    """A torn last line is taken away, whatever its length, and the rest is not looked at."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n' * 200_000
    path.write_bytes(whole + torn)
    with CountingFile(path, "rb+") as file:
        metrics._cut_torn_line(file)
        assert file.taken <= len(torn) + 70_000
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"torn", b"\n"])
def test_a_file_of_a_torn_line_alone_becomes_empty(content, tmp_path):
    """Nothing, a part of a line, and an end of a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    metrics.append_line(path, {"step": 2, "x": 1.0})
    assert path.read_bytes() == content.replace(b"torn", b"") + b'{"step": 2, "x": 1.0}\n'


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    """Every JSON reader takes a line of metrics and what a run says of itself."""
    path = tmp_path / "metrics.jsonl"
    line = {"step": 3, "unweighted_loss": math.nan, "weighted_loss": math.inf}
    line |= {"weight/max": math.nan, "weight/ess_frac": -math.inf, "a/capped_frac": math.nan}
    metrics.append_line(path, line)
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert math.isnan(read_lines(path)[0]["unweighted_loss"])
    text = about(tmp_path / "run.json", {"config": {"a": math.inf}}, {"step": 1})
    assert json.loads(text)["config"] == {"a": None}


def test_a_comparison_goes_on_past_null(tmp_path):
    """A run's lines are looked at while they come; a loss of null is not a number to show."""
    path = tmp_path / "metrics.jsonl"
    looks = series.new_lines(path)
    assert next(looks) == []
    path.write_text('{"step": 1, "unweighted_loss": null}\n{"step": 2, "unweighted_loss": NaN}\n')
    found = next(looks)
    assert all(math.isnan(line["unweighted_loss"]) for line in found)
