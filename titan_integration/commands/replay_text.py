"""How the sequences and documents of a record began: the run's data, read again.

What `weighting replay --text` calls.  A record holds no text, and need not: the stream of rows is
the same for any number of ranks, and row `r` of step `s` is row `(s - 1) n + r` of it, if a step
has n.  So each wanted row is read as the rank would that had only this row of every batch, which
takes a part of the text.
"""

from __future__ import annotations

import contextlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torchtitan.components.tokenizer import HuggingFaceTokenizer

import weighting as wt
from titan_integration.data.contents import Encoder
from titan_integration.data.identity import differences
from titan_integration.data.loader import EMBEDDED, DomainTextDataLoader, load_documents, scaled
from titan_integration.data.packing import Cut, PackedRows
from titan_integration.data.sources import is_sources
from titan_integration.host.quiet import quiet
from weighting.build.domains import proportions
from weighting.cli.common import give_up
from weighting.contract.levels import documents
from weighting.runs.layout import FOLDER
from weighting.runs.layout import RUN as ABOUT
from weighting.runs.record_reader import read_record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from weighting.runs.record_reader import Record

    Place = tuple[int, int]
    """Step and row of a sequence."""


def texts_of(run: Path, *, plugins: bool) -> Callable[[Sequence[Place]], dict[Place, list[str]]]:
    """Return what finds the texts of sequences of a run; on an error it exits with status 2."""

    def found(wanted: Sequence[Place]) -> dict[Place, list[str]]:
        try:
            with quiet():  # The host's notes are about training.
                return texts(run, wanted, plugins=plugins)
        except ValueError as error:
            give_up(str(error))

    return found


def texts(
    run: Path, wanted: Sequence[tuple[int, int]], *, plugins: bool = False
) -> dict[tuple[int, int], list[str]]:
    """Return the texts of the documents of sequences of a run, which may begin or end in one.

    Args:
        run: Its dump folder.
        wanted: Step and row of each, as in the record.
        plugins: Whether to import the modules that the run's spec names.

    Raises:
        ValueError: The run does not say which text it read, or that is not here, not the same, or
            not to be read again; says which.
    """
    if not wanted:
        return {}
    record, told = read_record(run), _told(run)
    _check_local(run, told.loader)
    rows = _rows_of_a_step(run, record)
    _check_starts(run, told.starts, record, rows)
    about = record.about
    size = about["rank_rows"] * about["ranks"]  # of a global batch of the loader
    tokenizer = _tokenizer(run, told.assets)
    proportions = _proportions(run, told, about, plugins=plugins)
    _check_same(run, told, _made_from(told, tokenizer, size))
    loaded = load_documents(told.loader)
    encode = Encoder(tokenizer)
    places = {divmod((step - 1) * rows + row, size): (step, row) for step, row in wanted}
    found: dict[tuple[int, int], list[str]] = {}
    for rank in sorted({rank for _, rank in places}):
        packed = PackedRows(
            loaded,
            encode,
            Cut(told.seq_len, 1, rank, size),
            rows=told.loader.rows,
            seed=told.loader.seed,
            infinite=told.loader.infinite,
        )
        packed.deal(told.starts[0].made_from["shards"])
        if proportions:
            packed.pools.proportions = proportions
        last = max(batch for batch, other in places if other == rank)
        for batch, (inputs, _, _) in enumerate(islice(packed, last + 1)):
            if (batch, rank) in places:
                found[places[batch, rank]] = _texts(inputs, tokenizer)
    return found


def _texts(inputs: dict[str, Tensor], tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Return the texts of the documents of a row."""
    (ids,), (of,) = inputs["input"], documents(inputs["positions"])
    parts = ids.split(of.bincount().tolist())
    return [tokenizer.decode(part.tolist(), skip_special_tokens=True) for part in parts]


_LEAVE = "or leave out --text"
_OLDER = "older"
"""In place of what a start did not yet say of its data."""


class _Start(NamedTuple):
    """A start of a run: its first step, its spec's hash, its text, and the next row of that."""

    step: int
    spec: str
    made_from: dict[str, Any]
    next_row: int


class _Told(NamedTuple):
    """What a run says of its data."""

    loader: DomainTextDataLoader.Config
    assets: str
    seq_len: int
    starts: list[_Start]


def _told(run: Path) -> _Told:
    """Return what `run.json` says.

    Raises:
        ValueError: It is not there, damaged, of an older version, or of another loader.
    """
    path = run / FOLDER / ABOUT
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        config = told["config"]
        given = dict(config["dataloader"])
        assets, seq_len = str(config["hf_assets_path"]), int(config["training"]["seq_len"])
        data = [start.get("data", _OLDER) for start in told["starts"]]
        starts = [
            _Start(start["step"], start["spec"], **its)
            for start, its in zip(told["starts"], data, strict=True)
            if isinstance(its, dict)
        ]
    except OSError as error:
        msg = f"{path}: {error.strerror}, and it says which text the run read; restore it, {_LEAVE}"
        raise ValueError(msg) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        msg = f"{path}: does not say which text the run read, so it is damaged; {_LEAVE[3:]}"
        raise ValueError(msg) from None
    if _OLDER in data:
        msg = (
            f"{path}: an older version wrote it, and it does not say where in its text a start of "
            f"the run began; {_LEAVE[3:]}"
        )
        raise ValueError(msg)
    given |= {"num_workers": 0, "persistent_workers": False, "prefetch_factor": None}
    if starts and len(starts) == len(data):
        with contextlib.suppress(TypeError):  # a field of another loader's
            return _Told(DomainTextDataLoader.Config(**given), assets, seq_len, starts)
    msg = f"{path}: the run read its text by another loader than DomainTextDataLoader; {_LEAVE[3:]}"
    raise ValueError(msg)


def _rows_of_a_step(run: Path, record: Record) -> int:
    sizes = record.sizes.unique().tolist()
    if len(sizes) > 1:
        msg = (
            f"{run}: its steps have from {sizes[0]} to {sizes[-1]} sequences, so steps do not tell "
            f"which rows of the text they had; {_LEAVE[3:]}"
        )
        raise ValueError(msg)
    return sizes[0]


def _check_starts(run: Path, starts: Sequence[_Start], record: Record, rows: int) -> None:
    """Check that the record is of these starts, and each went on where the one before had been.

    Raises:
        ValueError: One did not.
    """
    if not {told["hash"] for told in record.told} <= {start.spec for start in starts}:
        msg = f"{run}: {ABOUT} is of a later run than the record, of another spec; {_LEAVE[3:]}"
        raise ValueError(msg)
    for start in starts:
        if differences(starts[0].made_from, start.made_from):
            msg = f"{run}: resumed at step {start.step} onto other data; {_LEAVE[3:]}"
            raise ValueError(msg)
        if start.next_row != (row := (start.step - 1) * rows):
            msg = (
                f"{run}: began step {start.step} at row {start.next_row} of its text, where steps "
                f"of {rows} sequences are at row {row}; {_LEAVE[3:]}"
            )
            raise ValueError(msg)


def _check_local(run: Path, loader: DomainTextDataLoader.Config) -> None:
    where = loader.dataset_path or loader.dataset
    if loader.streaming:
        msg = f"{run}: its text, {where}, was streamed, and is not read twice; {_LEAVE[3:]}"
        raise ValueError(msg)
    if where == EMBEDDED and loader.dataset_path is None:
        return
    if is_sources(Path(where)):
        msg = f"{run}: its text is of several sources, {where}, and is not read again; {_LEAVE[3:]}"
        raise ValueError(msg)
    if not Path(where).expanduser().exists():
        msg = (
            f"{run}: its text, {where}, is not here: it is on a hub, or was moved; go to where the "
            f"run was started, put the text back, {_LEAVE}"
        )
        raise ValueError(msg)


def _tokenizer(run: Path, assets: str) -> HuggingFaceTokenizer:
    try:
        return HuggingFaceTokenizer.Config().build(tokenizer_path=assets)
    except OSError as error:
        msg = f"{run}: its tokenizer is not in {assets}: {error}; put it back, {_LEAVE}"
        raise ValueError(msg) from None


def _proportions(
    run: Path, told: _Told, about: dict[str, Any], *, plugins: bool
) -> tuple[float, ...] | None:
    """Return in which proportions rows were drawn; None if in no others than the loader's own.

    Raises:
        ValueError: They moved, or the run's spec cannot be read.
    """
    if told.loader.rows != "drawn":
        return None
    domains = told.starts[0].made_from["domains"]
    fn = wt.build(wt.loads(about["spec"], allow_plugins=plugins), domains=domains)
    if fn.plan.draws_live or len({start.spec for start in told.starts}) > 1:
        msg = f"{run}: proportions of domains moved while its text was drawn; {_LEAVE[3:]}"
        raise ValueError(msg)
    return scaled(proportions(fn).tolist(), tuple(domains)) if fn.plan.sampling else None


def _made_from(told: _Told, tokenizer: HuggingFaceTokenizer, size: int) -> dict[str, Any]:
    """Return what the loader makes rows from now."""
    loader = told.loader.build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=tokenizer,
        seq_len=told.seq_len,
        local_batch_size=size,
    )
    loader.take_shards(told.starts[0].made_from.get("shards"))
    return json.loads(loader.state_dict()["made_from"])


def _check_same(run: Path, told: _Told, now: dict[str, Any]) -> None:
    """Check that rows are made from what they were made from.

    Raises:
        ValueError: They are not; says what differs.
    """
    if different := differences(told.starts[0].made_from, now):
        where = told.loader.dataset_path or told.loader.dataset
        msg = f"{run}: its text, {where}, has changed: {'; '.join(different)}; restore it, {_LEAVE}"
        raise ValueError(msg)
