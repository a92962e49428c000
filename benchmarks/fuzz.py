"""Feed the readers of specs and `build` with texts nobody would write: refused, or whole.

    python benchmarks/fuzz.py [--cpu-minutes 10] [--seed 0] [--out benchmarks/fuzz.md]

Texts come from a grammar of the registered words, from the specs that the tests know, right and
hostile, and from earlier texts changed by tokens and by characters; a text that reaches a line of
the readers that none had reached before is kept to be changed again.  Of every text is asked:

- nothing is raised but SpecError, with places, in words that a terminal can show;
- no text takes more than a second of CPU time, nor more memory than there is;
- nothing is run, imported, opened or started;
- a spec printed in either spelling reads back equal, and prints and hashes the same;
- what it builds to weighs a small batch.

Exit status 1 with the texts if one is not so.  The same seed tries the same texts.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import weighting as wt
from weighting.registry import stages
from weighting.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1.0
"""Of CPU time that a text may take."""
PATIENCE = 300.0
"""Seconds by the clock after which a text that is stuck below Python ends all, with its stack."""
GIGABYTES = 8
"""Of address space beyond what is there at first; a spec that asks for more is a finding."""
READERS = ("build", "language", "errors.py", "pipeline.py", "schedules.py", "spec.py")
FILES = {
    str(file)
    for path in (Path(wt.__file__).with_name(name) for name in READERS)
    for file in (path.glob("*.py") if path.is_dir() else [path])
}
FORBIDDEN = {"compile", "exec", "import", "open", "os.system", "subprocess.Popen", "os.exec"}
"""Audit events that no text may cause."""
DOMAINS = ("code", "data", "docs", "tables", "tests")
TOKEN = re.compile(r"\s+|->|[\w.]+|.", re.DOTALL)
NUMBERS = ("0", "1", "-1", "0.4", "2/n", "1e-3", "1e308", "1e999", "-0.0", "5e-324", "0x1", "1_0")
NUMBERS = (*NUMBERS, "999999999999999999", "9" * 25, ".nan", ".inf", "1.", ".5", "+3", "1e", "½")
WORDS = ("true", "null", "~", "no", "n", "loss", "token", "document", "sequence", "domain", "code")
WORDS = (*WORDS, "last", "skip", '"a b"', "'x'", '"\\u00e9"', '"\\ud800"', '""', "{}", "{0: 1}")
MARKS = ("->", "→", "(", ")", "{", "}", "[", "]", ",", "=", ":", ": ", "- ", "\n", "\n  ", "'", '"')
MARKS = (*MARKS, "#", "&a ", "*a", "!x ", "|\n", ">\n", "? ", "%", "@", "\t", "\r", "---\n", "/n")
KEYS = ("version: 1\n", "name: x\n", "pipeline: ", "factors:\n  a: ", "scope: running\n")
KEYS = (*KEYS, "apply: both\n", "reduction: domain_mean\n", "normalize: none\n", "plugins: [os]\n")
ODD = "\0\x07\x1b\x7f\x85\xa0\xad\u200b\u202e\u2028\ud800\udfff\ufeff\uffff🦜é１٣"


class HangError(BaseException):
    """A text took too long; no Exception, so that nothing on the way can catch it."""


class RanError(BaseException):
    """A text made something run."""


@dataclass
class Outcome:
    """What came of all texts.

    Attributes:
        tried: How many texts there were.
        counts: How many were refused, read and built.
        lines: Lines of the readers that were reached.
        kept: Texts that reached one first.
        findings: By what went wrong, the shortest text that did it.
        seconds: CPU time.
        slowest: CPU seconds of the slowest text, of those whose lines were not noted.
    """

    tried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lines: set[tuple[str, int]] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    """Try texts, write the figures and print them; status 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu-minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "fuzz.md")
    args = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "weighting")]
    torch.set_num_threads(1)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + GIGABYTES * 2**30,) * 2)
    found = fuzz([*right(), *hostile()], args.seed, seconds=60 * args.cpu_minutes)
    text = report(found, args.seed)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    return int(bool(found.findings))


def right() -> list[str]:
    """Return the specs that the tests know: those that are shipped, and one for each stage."""
    from generators import CASES  # noqa: PLC0415 - the tests' own

    return [*CASES.values()]


def hostile() -> list[str]:
    """Return the texts that the tests know to be wrong."""
    from test_hostile import CASES  # noqa: PLC0415 - likewise

    return [*CASES.values()]


def fuzz(
    seeds: list[str], seed: int, *, seconds: float = float("inf"), most: float = float("inf")
) -> Outcome:
    """Try the seeds, and then texts made from them and from a grammar, until time or number is up.

    Args:
        seeds: Texts, right and wrong; those over 2,000 characters are tried but not changed.
        seed: Of chance.
        seconds: CPU time.
        most: Number of texts.
    """
    chance, found = random.Random(seed), Outcome()  # noqa: S311 - nothing secret
    began = time.process_time()
    waiting = list(seeds)
    corpus = [text for text in seeds if len(text) <= MOST]
    with watched():
        while found.seconds < seconds and found.tried < most:
            text = waiting.pop() if waiting else made(chance, corpus)
            before = len(found.lines)
            attempt(text, found)
            if len(found.lines) > before:
                found.kept.append(text)
                if len(text) <= MOST:
                    corpus += [text] * 10  # as likely as ten others
            found.seconds = time.process_time() - began
    return found


MOST = 2_000
"""Characters of a text that is changed."""


def made(chance: random.Random, corpus: list[str]) -> str:
    """Return a new text."""
    if chance.random() < 0.3:  # noqa: PLR2004 - the rest are changed texts
        return written(chance)
    text = chance.choice(corpus)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        text = chance.choice((by_tokens, by_tokens, by_tokens, by_characters))(chance, text, corpus)
    return text[:MOST]


def written(chance: random.Random) -> str:
    """Return a text by the grammar: mostly words in places where they may stand."""
    pipelines = [
        " -> ".join(call(chance, chance.choice([*stages()])) for _ in range(chance.randint(1, 4)))
        for _ in range(chance.choice((1, 1, 2)))
    ]
    if chance.random() < 0.5:  # noqa: PLR2004 - arrow text half the time
        return pipelines[0]
    options = "".join(x for x in KEYS if x.endswith("\n") and chance.random() < 0.2)  # noqa: PLR2004
    factors = "".join(f"  {name}: {x!r}\n" for name, x in zip("ab", pipelines, strict=False))
    body = f"pipeline: {pipelines[0]}\n" if len(pipelines) == 1 else f"factors:\n{factors}"
    return f"version: 1\n{options}{body}"


def call(chance: random.Random, name: str, depth: int = 0) -> str:
    """Return a call of a stage or schedule, most of its arguments known to it."""
    fields = list((stages().get(name) or SCHEDULES.get(name) or wt.Spec).model_fields)
    picked = [x for x in fields if chance.random() < 0.6]  # noqa: PLR2004
    if not picked:
        return name
    values: list[str] = []
    for argument in picked:
        value = chance.choice((*NUMBERS[:4], chance.choice(NUMBERS), chance.choice(WORDS)))
        if depth < 3 and chance.random() < 0.2:  # noqa: PLR2004
            value = call(chance, chance.choice([*SCHEDULES]), depth + 1)
        values.append(f"{argument}={value}" if chance.random() < 0.8 else value)  # noqa: PLR2004
    return f"{name}({', '.join(values)})"


def by_tokens(chance: random.Random, text: str, corpus: list[str]) -> str:
    """Return a text with a token put in, left out, doubled or replaced, or half of another's."""
    tokens = TOKEN.findall(text) or [""]
    at = chance.randrange(len(tokens))
    other = chance.choice((NUMBERS, WORDS, MARKS, KEYS, [*stages()], [*SCHEDULES]))
    token = chance.choice(other)
    match chance.randrange(6):
        case 0:
            tokens[at:at] = [token]
        case 1:
            del tokens[at]
        case 2:
            end = chance.randrange(at, min(len(tokens), at + 12)) + 1
            tokens[at:at] = tokens[at:end]
        case 3:
            further = TOKEN.findall(chance.choice(corpus)) or [""]
            tokens[at:] = further[chance.randrange(len(further)) :]
        case _:
            like = [i for i, x in enumerate(tokens) if re.match(r"[\w.]", x)] or [at]
            tokens[chance.choice(like)] = token
    return "".join(tokens)


def by_characters(chance: random.Random, text: str, corpus: list[str]) -> str:
    """Return a text with a character put in, left out or replaced, or with a bit of it turned."""
    del corpus
    at = chance.randrange(len(text) + 1)
    odd = chance.choice((*ODD, chr(chance.randrange(128)), chr(chance.randrange(0x110000))))
    match chance.randrange(4):
        case 0:
            return text[:at] + odd + text[at:]
        case 1:
            return text[:at] + text[at + 1 :]
        case 2:
            return text[:at] + odd + text[at + 1 :]
        case _:
            raw = bytearray(text.encode("utf-8", "surrogatepass"))
            if raw:
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            return raw.decode("utf-8", "replace")


def attempt(text: str, found: Outcome) -> None:
    """Try one text and note what came of it."""
    try:
        try:
            came = timed(text, found)
        except HangError:  # noting lines takes time of its own
            came = timed(text, found, note=False)
    except (Exception, HangError, RanError) as error:  # noqa: BLE001 - what is looked for
        came = "wrong"
        key = f"{type(error).__name__}: {str(error)[:80]} ({_origin(error)})"
        if key not in found.findings:
            print(f"{key}\n  {text!a}", file=sys.stderr, flush=True)
        if len(text) < len(found.findings.get(key, text + " ")):
            found.findings[key] = text
    found.counts[came] += 1
    found.tried += 1


def timed(text: str, found: Outcome, *, note: bool = True) -> str:
    """Return the outcome of a text, noting the lines it reaches.

    Raises:
        HangError: It takes too long.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    note = note and len(text) <= MOST
    before = sys.gettrace()
    try:
        if note:
            sys.settrace(noting(found.lines))
        began = time.process_time()
        came = outcome(text)
        if not note:
            found.slowest = max(found.slowest, time.process_time() - began)
        return came
    finally:
        sys.settrace(before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        _running.clear()


def outcome(text: str) -> str:
    """Return how far a text came; whatever it should not raise tells what is wrong.

    Raises:
        AssertionError: What was read does not print, read back, or is refused without a place.
    """
    _running.append(text)
    try:
        spec = wt.loads(text)
    except wt.SpecError as error:
        look_at(error)
        return "refused"
    for spelling in ("arrow", "yaml"):
        printed = wt.dumps(spec, spelling)
        again = wt.loads(printed)
        assert again == spec, f"{spelling} reads back as another spec"
        assert wt.dumps(again, spelling) == printed, f"{spelling} prints otherwise the second time"
        assert again.hash == spec.hash, f"{spelling} has another hash"
    try:
        fn = wt.build(spec, domains=DOMAINS)
    except wt.SpecError as error:
        look_at(error)
        return "read, and does not fit together"
    _running.clear()
    token = fn(batch(fn.needs), 3).token
    assert token.shape == (3, 4), "weights of another shape"
    assert token.isfinite().all(), "weights that are none"
    assert fn.plan.signed or (token >= 0).all(), "weights below 0"
    return "built"


def look_at(error: wt.SpecError) -> None:
    """Check that an error says where, in words that a terminal can show."""
    assert all(x.place is None or x.place.line >= 1 for x in error.problems), "no place"
    shown = str(error).replace("\n", "")
    assert len(shown) < 50_000, "a very long message"  # noqa: PLR2004 - many of them in one text


def batch(needs: frozenset[str]) -> wt.Signals:
    """Return signals of three rows of four tokens, one ignored, with the columns that are read."""
    chance = torch.Generator().manual_seed(0)
    shape = (3, 4)
    numbers = torch.rand((8, *shape), generator=chance)
    names = sorted(x.removeprefix("columns.") for x in needs if x.startswith("columns."))
    valid = torch.ones(shape, dtype=torch.bool)
    valid[1, 2] = False
    return wt.Signals(
        loss=5 * numbers[0],
        valid=valid,
        entropy=4 * numbers[1],
        target_prob=(-5 * numbers[0]).exp(),
        error_norm=numbers[2],
        ref_loss=5 * numbers[3],
        domain_ids=(len(DOMAINS) * numbers[4]).long(),
        segment_ids=torch.tensor([0, 0, 1, 1]).expand(shape),
        columns={name: (9 * numbers[5]).floor() for name in names},
    )


_running: list[str] = []
"""The text that is read just now, while nothing may run."""


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if _running and event in FORBIDDEN:
        _running.clear()
        msg = f"{event} {arguments[0]!r}"
        raise RanError(msg)


@cache
def _audit() -> None:
    """Add the hook; none can be removed, and this one does nothing while no text is read."""
    sys.addaudithook(_forbid)


@contextmanager
def watched() -> Iterator[None]:
    """Have the clock and the interpreter's audit end what takes long or runs something."""

    def late(number: int, frame: FrameType | None) -> None:
        del number, frame
        msg = f"more than {SECONDS:g} s of CPU time"
        raise HangError(msg)

    wt.build(wt.loads("normalize -> temperature(1)"))  # whatever is imported late is there now
    _audit()
    before = signal.signal(signal.SIGPROF, late)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


def noting(lines: set[tuple[str, int]]) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that notes lines of the readers, and leaves other files alone."""

    def inside(frame: FrameType, event: str, _: object) -> object:
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return inside

    def enter(frame: FrameType, event: str, _: object) -> object:
        del event
        return inside if frame.f_code.co_filename in FILES else None

    return enter


def _origin(error: BaseException) -> str:
    """Return the last line of the project that an error came through."""
    where, trace = "", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if "weighting" in path.parts or not where:
            where = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def report(found: Outcome, seed: int) -> str:
    """Return what came of it in Markdown."""
    shares = ", ".join(
        f"{100 * count / found.tried:.1f} % {what}" for what, count in found.counts.most_common()
    )
    lines = [
        "# Texts nobody would write",
        "",
        (
            f"`python benchmarks/fuzz.py`, seed {seed}: {found.tried:,} texts in "
            f"{found.seconds / 60:.1f} minutes of CPU time."
        ),
        f"{shares}.",
        (
            f"{len(found.lines):,} lines of the readers and of `build` were reached, the last of "
            f"them by {len(found.kept):,} texts that were kept to be changed again; the slowest, "
            f"of {MOST:,} characters and more, took {found.slowest:.2f} s."
        ),
        "",
        "Findings: none." if not found.findings else "Findings:",
        *(f"\n- {what}\n\n      {text!a}" for what, text in found.findings.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
