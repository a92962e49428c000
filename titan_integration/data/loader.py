"""The data loader: rows of packed documents that carry the domain of every token."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger
from typing_extensions import override

from titan_integration.data.bad_records import BadRecords, OnBadRecord
from titan_integration.data.contents import Encoder, check_vocabulary, hash_of
from titan_integration.data.data_files import (
    DataFile,
    data_at,
    is_pattern,
    local_files,
    saved_dataset,
    suffix_of,
)
from titan_integration.data.documents import (
    Documents,
    embedded_documents,
    hub_documents,
    local_documents,
    open_hub,
    open_saved,
)
from titan_integration.data.identity import differences, files_of, name_in, unsure
from titan_integration.data.label_counts import LabelCounts, read_counts
from titan_integration.data.packing import Cut, Encode, PackedRows, RowMode, is_count
from titan_integration.data.records import (
    DEFAULT_DOMAIN_COLUMN,
    LABEL_COUNT,
    ONLY_DOMAIN,
    Columns,
)
from titan_integration.data.sources import Sources, is_sources, read_sources
from titan_integration.data.stream_sources import HubStream, LocalStream, Source
from titan_integration.data.streaming import BAD_RECORDS, StreamedRows
from titan_integration.data.told import Told
from titan_integration.data.urls import Url
from weighting.columns import signal_of

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDED = "stdlib"
EXAMPLE = "example"
"""The column that numbers documents, from 0, in the order of the data."""
_MOST_EXAMPLES = 2**24
"""Numbers that a float32 holds exactly."""


class DomainTextDataLoader(ParallelAwareDataloader):
    """Yield ``({"input", "positions", "domain_ids"}, labels)``, each int64 ``[B, L]``.

    Columns come along as float32 ``"columns.<name>"``: at all its tokens a document's one value, or
    at each the value that belongs to its label. ``positions`` is 0 where a document, or the rest of
    one from an earlier row, starts. Labels never cross documents. The global batch does not depend
    on the number of ranks, in order and content (but for ``streaming``).

    The saved state is one small entry per virtual shard, written by the ranks that read the shard,
    instead of one entry per rank. Before the first batch the state lists all of them, which is what
    a checkpoint is then asked for: together the ranks have saved them all, so that a state fits any
    number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """What to read; ``persistent_workers`` has no effect, as a loader is read once.

        One worker is enough: each reads all of its rank's text, and they yield batches in turn.
        """

        dataset: str = EMBEDDED
        """``stdlib`` (the running Python's own library), a file, directory, pattern or
        address (.jsonl, .ndjson, .json, .csv, each also .gz or .zst, .arrow, .parquet, or what
        ``save_to_disk`` wrote), or a Hugging Face name. What ``dataset_path`` names wins."""

        hf_name: str | None = None
        """Configuration name of a Hugging Face data set."""

        split: str = "train"
        """``train`` or ``validation``; a directory's sub-directory; Hugging Face's split."""

        text_column: str = "text"
        """Column of the text, token ids or messages; dots reach into nested records. Records
        without a ``text`` may have ``input_ids`` or ``messages``."""

        domain_column: str = DEFAULT_DOMAIN_COLUMN
        """Column of the domain, such as ``meta.redpajama_set_name``; empty: one domain, ``all``."""

        domains: list[str] | None = None
        """Domain names in the order of their ids; default: the sorted names in the data (so give
        them where the training and validation text may not have the same domains)."""

        columns: list[str] = field(default_factory=list)
        """Columns of numbers that the batches carry: one for each document, or a list of one for
        each predicted token (each but the first, begin and end of text included). Dots reach into
        nested records. Those that the weighting's spec reads are added by the trainer; `example`
        numbers the documents, unless they are streamed."""

        label_counts: str = ""
        """File that ``weighting count`` wrote: the column ``label_count``, where a spec reads it,
        has the count of each token's label."""

        on_bad_record: OnBadRecord = "refuse"
        """``refuse``: the first record that cannot be used ends the run. ``skip``: it is passed
        over and counted; the metrics have the count as ``bad_records``."""

        streaming: bool = False
        """Read local files or Hugging Face data as a stream, instead of by index."""

        infinite: bool = True
        """Start over when the text ends."""

        rows: RowMode = "mixed"
        """``mixed``: documents as they come. ``drawn``: each row is of one domain, drawn with the
        loader's ``proportions``. ``turns``: each batch is of one domain, batch ``i`` (of all ranks,
        from 0) of domain ``i mod K`` of ``K``."""

        seed: int = 0
        """Seed of the order of documents (a stream keeps its own) and of the draws of domains."""

    domains: tuple[str, ...]
    """Domain names in the order of their ids."""
    documents: Documents | None
    """What was opened; None of a stream."""
    has_weights: bool
    """Whether the data says itself in which proportions rows are drawn."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **kwargs: Any,  # noqa: ANN401, ARG002 -- the host passes what other loaders need
    ) -> None:
        """Open the data and check it.

        Args:
            config: What to read.
            dp_world_size: Number of data-parallel ranks.
            dp_rank: This rank.
            tokenizer: Its begin and end of text tokens are added to every document.
            seq_len: Tokens of a row.
            local_batch_size: Rows of a batch on this rank.
            snapshot_every_n_steps: Accepted for the host; the state here is up to date after every
                batch.
            kwargs: Ignored.

        Raises:
            ValueError: For anything wrong with the data or its description; names the place and the
                fix.
        """
        sources = _sources(config)
        self.has_weights = sources is not None and sources.has_weights
        if self.has_weights and config.rows == "mixed":
            config = replace(config, rows="drawn")
        _check_settings(config)
        kept, encode = _taken(config, tokenizer)
        cut = Cut(seq_len, local_batch_size, dp_rank, dp_world_size)
        where = config.dataset_path or config.dataset
        made_from: dict[str, Any] = {
            "seq_len": seq_len,
            "vocab_size": encode.vocab_size,
            "rows": config.rows,
            "tokenizer": encode.digest,
        }
        rows: PackedRows | StreamedRows
        if config.streaming:
            rows, self.documents = _streamed_rows(config, encode, cut), None
            made_from |= {"stream": where, "split": config.split, "hf_name": config.hf_name}
            made_from |= {"text_column": config.text_column, "domain_column": config.domain_column}
            made_from |= {"seed": config.seed} if config.rows == "drawn" else {}
            if path := local_path(config):
                saved = saved_dataset(path, config.split)
                files = sorted(saved.glob("*.arrow")) if saved else local_files(path, config.split)
                made_from |= files_of({name_in(path, file): file for file in files})
        else:
            documents = kept or load_documents(config)
            self.documents = documents
            rows = PackedRows(
                documents,
                encode,
                cut,
                rows=config.rows,
                seed=config.seed,
                infinite=config.infinite,
            )
            largest, place = documents.largest_id
            check_vocabulary(largest, encode.vocab_size, place)
            rows.check_size(where)
            if sources is not None and self.has_weights:
                stages = sources.stages(documents.names)
                rows.pools.stages = [(n, scaled(x, documents.names)) for n, x in stages]
                made_from |= {"weights": [[*stage] for stage in stages]}
            made_from |= {"seed": config.seed, "shards": rows.num_shards}
            made_from |= {"documents": len(documents), "text": _fingerprint(documents)}
            made_from |= {"content": documents.content}
            if documents.stored:
                made_from |= files_of({file.name: file for file in documents.stored})
        self.domains = rows.domains
        self._encode = encode
        self._rows = rows
        self._mode = config.rows
        self._iterated = False
        self._state, self._own = dict(rows.start), False
        self._made_from = made_from | {"domains": list(rows.domains)}
        self._columns = list(config.columns)
        self._counts = _counts_of(config, tokenizer)
        self._made_from |= {} if self._counts is None else {"label_counts": self._counts.digest}
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.15 has deprecated; there is nothing a
            # user could do.
            warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
            super().__init__(
                rows,
                dp_rank=dp_rank,
                dp_world_size=dp_world_size,
                batch_size=None,  # whole batches, so that each brings along the state it leads to
                collate_fn=_unchanged,
                num_workers=config.num_workers,
                prefetch_factor=config.prefetch_factor,
                pin_memory=config.pin_memory and torch.cuda.is_available(),
                snapshot_every_n_steps=snapshot_every_n_steps,
            )

    @property
    def proportions(self) -> tuple[float, ...]:
        """How often rows of each domain are drawn, in the order of ``domains``; they sum to one.

        Uniform until they are set, to any numbers from 0 on, of which one is positive. The next
        batch is drawn with them, also in the middle of a run: set the same on all ranks, after the
        same batch. They are in no saved state; whoever sets them sets them again.

        Raises:
            ValueError: If rows are not drawn, if worker processes have drawn ahead already, or for
                anything else than a number from 0 on for each domain, not all 0.
        """
        self._check_drawn()
        return self._rows.pools.proportions

    @proportions.setter
    def proportions(self, proportions: Iterable[float]) -> None:
        self._check_drawn()
        if self.has_weights:
            msg = "data loader: the sources' weights say how rows are drawn; leave them out"
            raise ValueError(msg)
        if self._iterated and self.num_workers:
            msg = (
                "data loader: proportions cannot change now, as worker processes draw rows ahead; "
                "set --dataloader.num_workers 0"
            )
            raise ValueError(msg)
        self._rows.pools.proportions = scaled(proportions, self.domains)
        self._rows.pools.told = None

    def draw_step_by_step(self, batches: int) -> None:
        """Draw the batches of each step, so many, in what `tell` gives for it.

        Worker processes wait until it is told.  To be called before the first batch.
        """
        self._check_drawn()
        self._rows.pools.told = Told(batches, self.num_workers)

    def tell(self, proportions: Iterable[float]) -> None:
        """Give the proportions of the next step that has none, the same on all ranks.

        Raises:
            ValueError: As of `proportions`.
        """
        told = self._rows.pools.told
        assert told is not None, "draw_step_by_step comes first"
        told.tell(scaled(proportions, self.domains))

    @property
    def row_domains(self) -> int:
        """How many domains the rows of a batch may be of; 0 where a row may be of several."""
        return {"mixed": 0, "drawn": len(self.domains), "turns": 1}[self._mode]

    @property
    def bad_records(self) -> int:
        """How many records were passed over as bad: of all the data, or so far in a stream."""
        if self.documents is not None:
            return self.documents.bad_records
        assert isinstance(self._rows, StreamedRows)
        return self._rows.bad.count

    @property
    def identity(self) -> dict[str, Any]:
        """Facts and digests that are alike on all ranks whose loaders yield rows of one stream."""
        facts = {key: fact for key, fact in self._made_from.items() if key != "modified"}
        return facts | {"columns": self._columns}

    def _check_drawn(self) -> None:
        if self._mode != "drawn":
            msg = (
                f"data loader: rows {self._mode!r} are not drawn and have no proportions; set "
                "--dataloader.rows drawn"
            )
            raise ValueError(msg)

    @override
    # The host only ever takes iter() of a loader and next() of that.
    # pyrefly: ignore [bad-override]
    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield batches from the loaded state on; iterating again starts there again."""
        self._iterated = True
        self._state, self._own = dict(self._rows.start), True
        try:
            for inputs, labels, moved in super().__iter__():
                if isinstance(self._rows, StreamedRows):  # a worker may have counted them
                    self._rows.bad.count = moved.pop(BAD_RECORDS)
                self._state |= moved
                if self._counts is not None:
                    inputs[signal_of(LABEL_COUNT)] = self._counts.of(labels)
                yield inputs, labels
        finally:
            if self._rows.pools.told is not None:  # no worker waits for a step that never comes
                self._rows.pools.told.tell(None)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on after the last batch that was yielded."""
        saved = self._rows.saved(self._state, own=self._own)
        return {"made_from": json.dumps(self._made_from, sort_keys=True), **saved}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Start from a saved state, of any number of ranks; an empty one changes nothing.

        Raises:
            ValueError: If the state is damaged, or of other data, another row length or another
                tokenizer.
        """
        if not state_dict:
            return
        try:
            made_from = dict(json.loads(state_dict["made_from"]))
        except (KeyError, TypeError, ValueError):
            msg = (
                f"data loader state: 'made_from' is {state_dict.get('made_from')!r}; the "
                "checkpoint is damaged or of another loader. To start the data afresh: "
                "--checkpoint.exclude_from_loading dataloader"
            )
            raise ValueError(msg) from None
        if made_from.get("documents") == self._made_from.get("documents"):
            self.take_shards(made_from.get("shards"))
        if different := differences(made_from, self._made_from):
            msg = (
                f"data loader state: saved for other rows: {'; '.join(different)}. Restore the "
                "data, or start it afresh: --checkpoint.exclude_from_loading dataloader"
            )
            raise ValueError(msg)
        if (doubt := unsure(made_from, self._made_from)) and self.dp_rank == 0:
            logger.warning(f"data loader state: {doubt}")
        self._rows.load(state_dict)
        self._state, self._own = dict(self._rows.start), False

    def take_shards(self, number: object) -> None:
        """Go on with the number of shards of a saved state, of another batch size or version.

        Nothing changes if it cannot be one.
        """
        rows = self._rows
        if isinstance(rows, PackedRows) and is_count(number) and number:
            before = rows.num_shards
            rows.deal(cast("int", number))
            if rows.num_shards != number:  # an impossible one, which is said of the state
                rows.deal(before)
            self._made_from["shards"] = rows.num_shards
            if rows.num_shards != before:
                self._state = dict(rows.start)


def scaled(proportions: Iterable[float], domains: tuple[str, ...]) -> tuple[float, ...]:
    """Return the proportions of domains, scaled to sum one.

    Raises:
        ValueError: For another number of them, one that is not a finite number from 0 on, or if all
            are 0.
    """
    numbers = [float(p) for p in proportions]
    if len(numbers) != len(domains):
        msg = (
            f"data loader: {len(numbers)} proportions for {len(domains)} domains; give one for "
            f"each of {', '.join(domains)}, in this order"
        )
        raise ValueError(msg)
    for number, domain in zip(numbers, domains, strict=True):
        if not 0 <= number < math.inf:
            msg = (
                f"data loader: the proportion of domain {domain!r} is {number}; give finite "
                "numbers from 0 on"
            )
            raise ValueError(msg)
    if not any(numbers):
        msg = "data loader: every proportion is 0, so that no row can be drawn; make one positive"
        raise ValueError(msg)
    largest = max(numbers)  # first, as a sum of the largest numbers there are would be infinite
    total = math.fsum(number / largest for number in numbers)
    return tuple(number / largest / total for number in numbers)


def keep_open(config: DomainTextDataLoader.Config, loader: DomainTextDataLoader) -> None:
    """Hand what a loader has opened, and tokenized last, to the next one of the same data."""
    _kept[_key(config)] = loader.documents, loader._encode  # noqa: SLF001


_kept: dict[str, tuple[Documents | None, Encoder]] = {}
"""What `keep_open` was given and no loader has taken, by what was to be read."""


def _taken(
    config: DomainTextDataLoader.Config, tokenizer: BaseTokenizer
) -> tuple[Documents | None, Encoder]:
    encode = Encoder(tokenizer)
    documents, before = _kept.pop(_key(config), (None, None))
    if before and before.digest == encode.digest:
        encode.last = before.last
    return documents, encode


_OF_ROWS = {"infinite", "rows", "seed"} | {f.name for f in fields(ParallelAwareDataloader.Config)}
"""Settings that say how rows are made, and not what is opened."""


def _key(config: DomainTextDataLoader.Config) -> str:
    names = {f.name for f in fields(config)} - _OF_ROWS | {"dataset", "dataset_path"}
    return repr([(name, getattr(config, name)) for name in sorted(names)])


def load_documents(config: DomainTextDataLoader.Config) -> Documents:
    """Open the documents that a configuration names, by index.

    Raises:
        ValueError: For anything wrong with the data or its description.
    """
    documents = _read_documents(config)
    if EXAMPLE not in config.columns:
        return documents
    count = len(documents)
    if count > _MOST_EXAMPLES:
        msg = (
            f"{config.dataset_path or config.dataset}: {count} documents, and at most "
            f"{_MOST_EXAMPLES} can be told apart by number; use less data, or another spec"
        )
        raise ValueError(msg)
    numbers = (*documents.numbers, np.arange(count, dtype=np.float32))
    return replace(documents, columns=(*documents.columns, EXAMPLE), numbers=numbers)


def _read_documents(config: DomainTextDataLoader.Config) -> Documents:
    columns = columns_read(config)
    if config.dataset == EMBEDDED and config.dataset_path is None:
        return embedded_documents(config.split, config.domains, columns.numbers)
    if path := local_path(config):
        bad = BadRecords(config.on_bad_record)
        if is_sources(path):
            each = read_sources(cast("Path", path)).paths(cast("Path", path))
            return local_documents(path, config.split, columns, config.domains, bad, each)
        if folder := saved_dataset(path, config.split):
            return hub_documents(open_saved(folder), columns, config.domains, str(folder))
        return local_documents(path, config.split, columns, config.domains, bad)
    dataset = open_hub(config.dataset, config.hf_name, config.split, streaming=False)
    return hub_documents(dataset, columns, config.domains, config.dataset)


def _check_settings(config: DomainTextDataLoader.Config) -> None:
    """Check what needs no data.

    Raises:
        ValueError: A setting cannot be so; names its flag.
    """
    if config.seed < 0:
        msg = f"seed {config.seed} is negative; set --dataloader.seed to 0 or more"
        raise ValueError(msg)
    if config.rows not in get_args(RowMode):
        msg = f"rows {config.rows!r}; set --dataloader.rows to {', '.join(get_args(RowMode))}"
        raise ValueError(msg)
    if config.rows != "mixed" and not config.infinite:
        msg = (
            f"rows {config.rows!r} of a text that is read once: it would end domain by domain; "
            "set --dataloader.infinite or --dataloader.rows mixed"
        )
        raise ValueError(msg)
    if config.on_bad_record not in get_args(OnBadRecord):
        msg = (
            f"on_bad_record {config.on_bad_record!r}; set --dataloader.on_bad_record to "
            f"{' or '.join(get_args(OnBadRecord))}"
        )
        raise ValueError(msg)


def _streamed_rows(config: DomainTextDataLoader.Config, encode: Encode, cut: Cut) -> StreamedRows:
    where = config.dataset_path or config.dataset
    if where == EMBEDDED:
        msg = (
            "dataset 'stdlib' is in memory and cannot be streamed; leave out --dataloader.streaming"
        )
        raise ValueError(msg)
    if config.domain_column and not config.domains:
        msg = (
            f"{where}: a stream does not tell its domains beforehand; list them in "
            "--dataloader.domains, or set --dataloader.domain_column '' for a single one"
        )
        raise ValueError(msg)
    if not config.infinite and cut.num_ranks > 1:
        msg = (
            f"{where}: a stream does not tell its length, so {cut.num_ranks} ranks could stop at "
            "different steps and hang; limit the steps (--validator.steps) or leave out "
            "--dataloader.streaming"
        )
        raise ValueError(msg)
    if config.num_workers > 1:
        msg = f"{where}: a stream can use at most one worker, not {config.num_workers}"
        raise ValueError(msg)
    columns, bad = columns_read(config), BadRecords(config.on_bad_record)
    domains = tuple(config.domains or ()) if config.domain_column else (ONLY_DOMAIN,)
    rows = StreamedRows(
        _source(config, columns, cut, bad),
        encode,
        cut,
        columns,
        domains,
        rows=config.rows,
        seed=config.seed,
        infinite=config.infinite,
        bad=bad,
    )
    rows.check_first()
    return rows


def _sources(config: DomainTextDataLoader.Config) -> Sources | None:
    """Return the sources that a configuration names, if it names a file of them.

    Raises:
        ValueError: For anything wrong with them, or settings that they cannot have.
    """
    path = local_path(config)
    if path is None or isinstance(path, Url) or not is_sources(path):
        return None
    found = read_sources(path)
    if config.streaming:
        msg = f"{path}: sources are read by index; leave out --dataloader.streaming"
        raise ValueError(msg)
    if found.has_weights and config.rows == "turns":
        msg = f"{path}: domains take turns here, and are not drawn by weight; leave out the weights"
        raise ValueError(msg)
    return found


def _source(
    config: DomainTextDataLoader.Config, columns: Columns, cut: Cut, bad: BadRecords
) -> Source:
    path = local_path(config)
    if path is None:
        stream = open_hub(config.dataset, config.hf_name, config.split, streaming=True)
        return HubStream(stream, config.dataset, cut)
    if folder := saved_dataset(path, config.split):
        return HubStream(open_saved(folder).to_iterable_dataset(), str(folder), cut)
    return LocalStream(path, config.split, columns, cut, bad)


def columns_read(config: DomainTextDataLoader.Config) -> Columns:
    """Return the columns that are read from the data; documents by index are numbered here."""
    made = set() if config.streaming else {EXAMPLE}
    made |= {LABEL_COUNT} if counts_labels(config) else set()
    numbers = [name for name in config.columns if name not in made]
    return Columns(config.text_column, config.domain_column, tuple(numbers))


def counts_labels(config: DomainTextDataLoader.Config) -> bool:
    """Tell whether batches carry the counts of a file of labels."""
    return bool(config.label_counts) and LABEL_COUNT in config.columns


def local_path(config: DomainTextDataLoader.Config) -> DataFile | None:
    """Return the file, folder, pattern or address that a configuration names; None if none.

    Raises:
        ValueError: The name is empty.
    """
    if not (config.dataset if config.dataset_path is None else config.dataset_path).strip():
        msg = (
            "the data's name is empty, as from a variable that is not set; name a file, a folder "
            "or an address, or leave --data out for the text that comes with Python"
        )
        raise ValueError(msg)
    if config.dataset_path is not None:
        return data_at(config.dataset_path)
    path = data_at(config.dataset)
    looks_local = config.dataset.startswith((".", "/", "~")) or suffix_of(path) != ""
    if looks_local or isinstance(path, Url) or is_sources(path) or is_pattern(path):
        return path
    # Megatron's files are named without what they end in.
    is_here = any(os.path.exists(f"{path}{end}") for end in ("", ".idx"))  # noqa: PTH110
    return path if is_here else None


def _counts_of(config: DomainTextDataLoader.Config, tokenizer: BaseTokenizer) -> LabelCounts | None:
    return read_counts(config.label_counts, tokenizer) if counts_labels(config) else None


def _fingerprint(documents: Documents) -> str:
    """Hash a few documents of all parts, to notice that a state belongs to other text."""
    few = [documents[i] for i in range(0, len(documents), max(1, len(documents) // 64))]
    told = [(x if isinstance(x, str) else hash_of(x).hex(), domain) for x, domain in few]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _unchanged(batch: Any) -> Any:  # noqa: ANN401
    return batch
