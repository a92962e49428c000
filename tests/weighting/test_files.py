"""Files that are there whole or not at all, JSON, and lines of metrics in little memory."""

import json
import math
import os
import stat
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from weighting.runs.files import (
    _read_each,
    json_text,
    numbers_of,
    open_lock,
    read_lines,
    write_whole,
    writing_whole,
)


def test_a_link_under_the_name_of_the_part_is_not_followed(tmp_path):
    """Nobody can know the name; that of earlier versions, made a link, leads nowhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "out.json"
    (tmp_path / f".out.json.{os.getpid()}.part").symlink_to(victim)
    (tmp_path / "out.json.part").symlink_to(victim)
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert victim.read_text() == "precious"


def test_a_part_is_made_anew(tmp_path, monkeypatch):
    """Even under a name that was guessed, a link or a file that waits there is an error."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".out.json.guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "out.json", "new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out.json").exists()


def test_who_may_read_a_file_is_up_to_the_umask(tmp_path):
    """As for any file that a program makes."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_whole(tmp_path / "file", b"x")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    """Also one in the middle of writing."""
    path = tmp_path / ("n" * 250)  # as long as a name may be, or nearly
    write_whole(path, "old")
    with pytest.raises(TypeError), writing_whole(path) as file:
        file.write("this is no bytes")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    """Else the file it points to would be emptied."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(tmp_path / "lock")
    with open_lock(tmp_path / "other") as file:
        file.write("x")
    assert (tmp_path / "other").read_text() == "x"


@pytest.fixture(params=["with pyarrow", "line by line"])
def reader(request):
    """Return what reads lines, either way."""
    if request.param == "line by line":
        return _read_each
    pytest.importorskip("pyarrow")
    return read_lines


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(bad):
    """JSON knows no others, wherever they stand."""

    def never(name):
        pytest.fail(f"{name} is not JSON")

    text = json_text({"a": bad, "b": [1.5, bad, {"c": (bad, True)}], "d": "NaN", 3: None})
    found = json.loads(text, parse_constant=never)
    assert found == {"a": None, "b": [1.5, None, {"c": [None, True]}], "d": "NaN", "3": None}


def test_null_and_nan_are_read_alike(tmp_path, reader):
    """Lines of this version have null where those of earlier ones have NaN."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": NaN}\n{"step": 2, "x": null}\n{"step": 3, "x": 2, "y": 1}\n')
    lines = reader(path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isnan(line["x"]) for line in lines[:2])
    assert lines[-1] == {"step": 3, "x": 2.0, "y": 1.0}
    assert [*lines.series("x")] == [(3, 2.0)]
    assert [*lines.series("z")] == []


def test_the_last_line_of_a_step_counts(tmp_path, reader):
    """In step order, as a run that was resumed has written some steps twice."""
    path = tmp_path / "metrics.jsonl"
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    path.write_text("".join(f'{{"step": {step}, "x": {x}}}\n' for step, x in steps) + '{"step": 5')
    assert [*reader(path).series("x")] == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    path.write_text('{"step": 1, "x": 1}\n[]\n{"step": 2, "x": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a line of metrics; take it out"):
        reader(path)


@pytest.mark.slow
def test_lines_take_less_memory_than_their_text(tmp_path, reader):
    """Of each number eight bytes are kept, and while a file is read no more than its text."""
    path, small = tmp_path / "metrics.jsonl", tmp_path / "small.jsonl"
    names = [f"factor{i}/{kind}" for i in range(5) for kind in ("min", "max", "ess_frac")]
    with path.open("w") as file:
        for step in range(1, 5_001):
            line = {"step": step, **{name: step * 1.1 + i / 7 for i, name in enumerate(names)}}
            file.write(json.dumps(line) + "\n")
    small.write_text('{"step": 1}\n')
    reader(small)  # what is imported does not count
    tracemalloc.start()
    lines = reader(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lines) == 5_000
    assert kept < 1.5 * 8 * 5_000 * (1 + len(names))
    assert peak < path.stat().st_size


LIKE = {
    "plain": '{"step": 1, "x": 1.5, "n": 3}\n{"step": 2, "x": 2, "n": 4}\n',
    "names that come and go": '{"step": 1, "x": 1}\n{"step": 2, "y": 2.5}\n{"step": 3, "x": 2}\n',
    "twice": '{"step": 2, "x": 1}\n{"step": 1, "x": 2}\n{"step": 2, "x": 3}\n{"step": 1, "y": 4}\n',
    "no end": '{"step": 1, "x": 1}\n{"step": 2, "x": 0.1}',
    "NaN": '{"step": 1, "x": NaN}\n{"step": 2, "x": 0.1}\n',
    "true": '{"step": 1, "x": true}\n{"step": 2, "x": false}\n',
    "steps with a point": '{"step": 1.0, "x": 1}\n{"step": 2.0, "x": 2}\n',
    "large": '{"step": 1, "x": 12345678901234567890}\n{"step": 2, "x": 9007199254740993}\n',
    "a name twice": '{"step": 1, "x": 1, "x": 2}\n{"step": 2, "x": 3}\n',
    "nothing": "",
}


@pytest.mark.parametrize("text", LIKE.values(), ids=LIKE)
def test_pyarrow_reads_what_is_read_line_by_line(tmp_path, text):
    """Names, their order and numbers to the last digit, whether or not pyarrow is there."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    found, expected = read_lines(path), _read_each(path)
    assert repr([*found]) == repr([*expected])


WRONG = {
    "two in a line": '{"step": 1, "x": 1}{"step": 2, "x": 1}\n',
    "one over two lines": '{"step": 1,\n"x": 1}\n',
    "an empty line": '{"step": 1, "x": 1}\n\n',
    "words": '{"step": 1, "x": "1"}\n',
    "a time": '{"step": 1, "x": "2026-11-20"}\n',
    "a list": '{"step": 1, "x": [1]}\n',
    "a step that is null": '{"step": null, "x": 1}\n',
    "no step": '{"x": 1}\n',
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_line_of_something_else_is_named(tmp_path, text):
    """By its number, however the file is read."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "x": 1}\n' + text + '{"step": 6, "x": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:[23]: not a line of metrics; take it out"):
        read_lines(path)


def test_columns_are_read_as_they_stand_with_their_gaps():
    """Cut out of larger ones, in two pieces, of 64 and 32 bits; NaN is a number, and no gap."""
    whole = pa.chunked_array([[7, 1, None], [3, 9, None]]).slice(1, 4)
    numbers, gaps = numbers_of(whole, pa.float64())
    assert numbers[[0, 2, 3]].tolist() == [1, 3, 9]
    assert np.isnan(numbers[1])
    assert gaps.tolist() == [False, True, False, False]
    one = pa.chunked_array([pa.array([5, 6, 7], pa.int32())]).slice(1)
    assert numbers_of(one, one.type)[0].tolist() == [6, 7]
    numbers, gaps = numbers_of(pa.chunked_array([[0.5, math.nan]]), pa.float64())
    assert np.isnan(numbers[1])
    assert not gaps.any()
