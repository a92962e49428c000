"""What single sequences and documents lost and weighed, noted on the device and written as Parquet.

Notes are taken in tensors at fixed addresses, as in `state`, and where a batch is noted is a number
on the device too: a captured step records like any other, and no step waits for the device.  One
rank writes for all, so a file has whole steps; it appears under its name when it is whole.
`weighting.runs.record_reader` reads them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from titan_integration.host.run_dir import writing
from weighting.columns import HIDDEN
from weighting.contract import Alone
from weighting.counter_rng import uniform
from weighting.errors import nearest
from weighting.runs.files import json_text, writing_whole
from weighting.runs.record_reader import (
    ABOUT,
    DOCUMENT,
    DOCUMENTS,
    DOMAIN,
    ROW,
    SEQUENCES,
    STEP,
    TOKENS,
    VALID,
    WEIGHT,
)
from weighting.runs.run_json import set_aside

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from weighting import Weighting
    from weighting.contract import Collectives

ROOM = 64
"""Recorded steps that are held on the device; then they are written."""
POSITION = "position"
"""Column of the files of tokens: the token's place in its sequence."""


class Asked(NamedTuple):
    """What to record: every so many steps, and of each of these so many tokens.

    And so many documents of each sequence, the first ones.
    """

    every: int
    tokens: int = 0
    documents: int = 0


def asked(text: str) -> Asked:
    """Return what `--weighting.record` asks for, in words such as "every=10,tokens=64".

    Raises:
        ValueError: A word is wrong, or `every` is missing.
    """
    found: dict[str, int] = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        wrong = ""
        if name not in Asked._fields:
            wrong = f"unknown word {name!r}{nearest(name, Asked._fields)}"
        elif name in found:
            wrong = f"{name} twice"
        elif not value.isdecimal() or int(value) == 0:
            wrong = f"{name}={value} is no whole number from 1 on"
        if wrong:
            example = "every=10, or every=10,documents=8,tokens=64"
            msg = f"--weighting.record {text}: {wrong}; write {example}"
            raise ValueError(msg)
        found[name] = int(value)
    if "every" not in found:
        msg = f"--weighting.record {text}: it does not say when; write every=10,{text}"
        raise ValueError(msg)
    return Asked(**found)


class Layout(NamedTuple):
    """How the batch of a step comes to a rank.

    Attributes:
        calls: How many times the loss is called in a step.
        rows: Sequences of a call on this rank.
        length: Tokens of a sequence, on all ranks that share it.
        together: Calls whose sequences are weighed as one microbatch.
    """

    calls: int
    rows: int
    length: int
    together: int


class Recorder:
    """Notes, of every N-th step, mean signals and weight of sequences and documents, and tokens.

    Attributes:
        asked: What to record.
    """

    def __init__(
        self,
        asked: Asked,
        fn: Weighting,
        layout: Layout,
        folder: Path | None,
        *,
        device: torch.device,
        ranks: Collectives | None = None,
        places: Tensor | None = None,
    ) -> None:
        """Make room.

        Args:
            asked: What to record.
            fn: The built spec.
            layout: How batches come.
            folder: Where to write; None on the ranks that do not.
            device: Where batches are.
            ranks: Reaches the ranks with other sequences, and with other parts of these.
            places: Where in its sequence each token of a row is that is on this rank, [L]; None
                where sequences are whole.
        """
        self.asked = asked
        self._layout, self._folder, self._ranks = layout, folder, ranks or Alone()
        further = {name for name in fn.needs if not name.endswith("_ids")} - {"loss", HIDDEN}
        self._signals = ("loss", *sorted(further))
        self._domains = fn.domains
        self._about = {
            "name": fn.spec.name,
            "hash": fn.spec.hash,
            "spec": str(fn.spec),
            "domains": list(fn.domains),
            "every": asked.every,
            "ranks": self._ranks.size,
            "rank_rows": layout.rows,
            "batch_rows": layout.rows * layout.together * self._ranks.size,
            "documents": min(asked.documents, layout.length),
        }
        self._steps: list[int] = []
        self._seen, self._now = 0, 0
        # One place more, for the steps that are not recorded: they are noted alike and forgotten.
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        columns = 2 + len(self._signals)
        shape = ((ROOM + 1) * layout.calls, layout.rows)
        # Sums over the first documents of each row, and over all that comes after them.
        self._kept = self._about["documents"]
        parts = (self._kept + 1, columns + len(fn.domains))
        self._rows = torch.zeros(*shape, *parts, device=device)
        self._documents = torch.zeros(*shape, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(ROOM + 1, columns + 1, asked.tokens, device=device)
        # Where a token of a sequence is on this rank, -1 where it is not.
        self._here = torch.full((layout.length,), -1, device=device)
        places = torch.arange(layout.length, device=device) if places is None else places
        self._here[places] = torch.arange(len(places), device=device)

    @property
    def reads_documents(self) -> bool:
        """Whether it asks which document each token is in."""
        return self.asked.documents > 0

    def begin_step(self, step: int) -> None:
        """Take the calls that follow for those of a step; a run's first sets older files aside."""
        if step == 1 and self._folder is not None:
            set_aside(self._folder)
        self._seen, self._now = 0, step
        self._step.fill_(step)
        place = len(self._steps) if step % self.asked.every == 0 else ROOM
        self._place.fill_(place)
        self._tokens[place].zero_()

    def next_call(self, into: Tensor | None) -> Tensor:
        """Return which call of its step the next batch is, 0-D, in the tensor it was in before."""
        number = self._seen % self._layout.calls  # a step may be gone through twice
        self._seen += 1
        return torch.full_like(self._step, number) if into is None else into.fill_(number)

    def add(self, number: Tensor, signals: Mapping[str, Tensor], token: Tensor) -> None:
        """Note a call.

        Args:
            number: Which call of its step it is, 0-D.
            signals: Its signals by name, [B, L]; without "loss" that is noted as NaN.
            token: Its weights, [B, L].
        """
        valid = signals["valid"]
        channels = [valid, token, *(_signal(name, signals) for name in self._signals)]
        # What is said of ignored tokens means nothing.
        x = torch.where(valid, torch.stack([channel.float() for channel in channels]), 0)
        ids = torch.zeros_like(valid, dtype=torch.int64)
        if self._domains:
            ids = torch.where(valid, signals["domain_ids"], 0)
        at = self._place * self._layout.calls + number
        document = torch.zeros_like(ids)
        if self._kept:  # of an ignored token nothing is known, not even that there is a document
            document = torch.where(valid, signals["segment_ids"], -1)
            self._documents.index_copy_(0, at, (document.amax(1) + 1)[None])
            document = document.clamp(0, self._kept)
        self._rows.index_copy_(0, at, self._sums(x, ids, document)[None])
        if self.asked.tokens:
            picked = self._picked(number, torch.cat([x, ids.float()[None]]))
            self._tokens.index_add_(0, self._place, picked[None])

    def end_step(self) -> None:
        """Keep the notes of a step that has been taken; every rank must call it.

        When there is no room for more, all are written.
        """
        if self._now % self.asked.every == 0:
            self._steps.append(self._now)
        if len(self._steps) == ROOM:
            self.flush()

    def flush(self) -> None:
        """Write what has been noted; every rank must call it."""
        count = len(self._steps)
        if not count:
            return
        parts = self._ranks.parts
        sums = self._gathered(parts.sum(self._noted(self._rows))).double()
        documents = self._gathered(parts.max(self._noted(self._documents)))
        tokens = self._tokens[:count]
        tokens = self._ranks.sum(tokens) if self.asked.tokens else tokens
        if self._folder is not None:
            given = (x.cpu().numpy() for x in (sums, documents, tokens))
            self._write(self._folder, *given)
        self._steps.clear()

    def _noted(self, x: Tensor) -> Tensor:
        """Return what was noted of the steps that were recorded, [steps, calls, B, ...]."""
        count = len(self._steps)
        return x[: count * self._layout.calls].unflatten(0, (count, -1))

    def _gathered(self, x: Tensor) -> Tensor:
        """Return notes of all ranks, [steps, sequences in the data's order, ...]."""
        return self._ranks.gather(x).movedim(0, 2).flatten(1, 3)

    def _sums(self, x: Tensor, ids: Tensor, document: Tensor) -> Tensor:
        """Return the sums of [C, B, L] over the parts of each row, and tokens by domain, [B, P, .].

        Args:
            x: What is added up; the first channel tells which tokens count.
            ids: Domain of each token, [B, L].
            document: Part of the row that each token is in, [B, L].
        """
        rows, parts = len(document), self._kept + 1
        part = torch.arange(rows, device=x.device)[:, None] * parts + document
        sums = x.sum(-1)  # faster than adding one token after the other
        if self._kept:
            sums = x.new_zeros(len(x), rows * parts).index_add(1, part.flatten(), x.flatten(1))
        sums = sums.T
        if self._domains:
            number = len(self._domains)
            of = (part * number + ids).flatten()
            counts = x.new_zeros(rows * parts * number).index_add(0, of, x[0].flatten())
            sums = torch.cat([sums, counts.view(-1, number)], dim=1)
        return sums.unflatten(0, (rows, parts))

    def _picked(self, number: Tensor, x: Tensor) -> Tensor:
        """Return of [C, B, L] this rank's tokens of the sample, [C, K]; 0 for those of others."""
        row, position = self._sample(self._step)
        mine = row - (number * self._ranks.size + self._ranks.rank) * self._layout.rows
        here = self._here[position]
        held = (mine >= 0) & (mine < self._layout.rows) & (here >= 0)
        place = torch.where(held, mine * x.shape[2] + here, 0)
        return torch.where(held, x.flatten(1)[:, place], 0)

    def _sample(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens to note of a step: rows of its batch, and positions, [K] each."""
        layout = self._layout
        spans = layout.calls * layout.rows * self._ranks.size, layout.length
        row, position = (
            (uniform(seed, step, self.asked.tokens) * span).long().clamp(max=span - 1)
            for seed, span in enumerate(spans)
        )
        return row, position

    def _write(
        self, folder: Path, sums: np.ndarray, documents: np.ndarray, tokens: np.ndarray
    ) -> None:
        """Write a file of each kind.

        Args:
            folder: Where to.
            sums: [steps, sequences, parts, columns].
            documents: How many each sequence has, [steps, sequences].
            tokens: [steps, columns, K].

        Raises:
            ValueError: They cannot be written.  No checkpoint is past them yet, so a run that goes
                on notes them again.
        """
        steps = np.array(self._steps, np.int32)
        # Sequences come last: without a file of them its companions do not count.
        kinds = {
            TOKENS: partial(self._of_tokens, steps, tokens) if self.asked.tokens else None,
            DOCUMENTS: partial(self._of_documents, steps, sums, documents) if self._kept else None,
            SEQUENCES: partial(self._of_sequences, steps, sums.sum(2)),
        }
        with writing(f"{folder}, steps {steps[0]} to {steps[-1]}"):
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name.partition(".")[0].rpartition("-")[2] for path in folder.iterdir()}
            number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
            for kind, columns in kinds.items():
                if columns is not None:
                    write_part(folder / f"{kind}-{number:06}.parquet", columns(), self._about)

    def _of_sequences(self, steps: np.ndarray, sums: np.ndarray) -> dict[str, Any]:
        rows = np.arange(sums.shape[1], dtype=np.int32)
        where = {STEP: np.repeat(steps, len(rows)), ROW: np.tile(rows, len(steps))}
        return where | self._means(sums.reshape(-1, sums.shape[-1]))

    def _of_documents(
        self, steps: np.ndarray, sums: np.ndarray, documents: np.ndarray
    ) -> dict[str, Any]:
        kept = sums[:, :, : self._kept]
        there = kept[..., 0] > 0
        step, row, document = (x.astype(np.int32) for x in there.nonzero())
        count = documents[step, row].astype(np.int32)
        where = {STEP: steps[step], ROW: row, DOCUMENT: document, DOCUMENTS: count}
        return where | self._means(kept[there])

    def _means(self, sums: np.ndarray) -> dict[str, Any]:
        """Return what sums say of each sequence or document, [n, columns]."""
        width = 2 + len(self._signals)
        count, total = sums[:, 0], sums[:, 1:width]
        means = (total / np.maximum(count, 1)[:, None]).T.astype(np.float32)
        return {
            DOMAIN: self._named(sums[:, width:].argmax(-1) if self._domains else count),
            VALID: count.astype(np.int32),
            **dict(zip((WEIGHT, *self._signals), means, strict=True)),
        }

    def _of_tokens(self, steps: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
        samples = [torch.stack(self._sample(torch.tensor(step))) for step in self._steps]
        rows, positions = torch.stack(samples, 1).int().flatten(1).numpy()
        valid, *means, ids = tokens.swapaxes(0, 1).reshape(tokens.shape[1], -1)
        found = {
            STEP: np.repeat(steps, self.asked.tokens),
            ROW: rows,
            POSITION: positions,
            DOMAIN: ids,
            **dict(zip((WEIGHT, *self._signals), means, strict=True)),
        }
        there = valid > 0
        found = {name: x[there] for name, x in found.items()}
        return {**found, DOMAIN: self._named(found[DOMAIN])}

    def _named(self, ids: np.ndarray) -> pa.Array:
        """Return the domains' names; null where there are no domains."""
        if not self._domains:
            return pa.nulls(ids.size, pa.string()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(ids.astype(np.int32).ravel(), list(self._domains))


def write_part(path: Path, columns: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write columns as a Parquet file, which appears whole or not at all.

    Args:
        path: The file.
        columns: By name; those of float32 keep 16 significant bits, an error of 1 in 130,000.
        about: What is written into the file about the run.
    """
    floats = [name for name, x in columns.items() if getattr(x, "dtype", None) == np.float32]
    kept = {name: _rounded(x) if name in floats else x for name, x in columns.items()}
    ascending = dict.fromkeys({STEP, ROW} & columns.keys(), "DELTA_BINARY_PACKED")
    dictionaries = [name for name in (DOMAIN, VALID, DOCUMENT, DOCUMENTS) if name in columns]
    with (
        writing_whole(path) as file,
        pq.ParquetWriter(
            file,
            pa.table(kept).schema,
            compression="zstd",
            use_dictionary=dictionaries,
            use_byte_stream_split=floats,
            column_encoding=ascending,
            write_statistics=False,
            store_schema=False,
        ) as writer,
    ):
        writer.write_table(pa.table(kept))
        writer.add_key_value_metadata({ABOUT: json_text(about)})


def _signal(name: str, signals: Mapping[str, Tensor]) -> Tensor:
    """Return a signal, derived where the loss tells it, and NaN where nothing does."""
    if name in signals:
        return signals[name]
    if "loss" not in signals:
        return torch.full_like(signals["valid"], torch.nan, dtype=torch.float32)
    assert name == "target_prob", name
    return (-signals["loss"]).exp()


def _rounded(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers whose last byte is 0, which compresses to nothing."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), ((bits + 0x80) & 0xFFFFFF00).view(np.float32), x)
