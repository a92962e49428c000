"""Where the records of each domain are in files, found as far as any domain has asked."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from titan_integration.data.formats import Spot
from titan_integration.data.one_reading import Item
from titan_integration.data.stream_sources import Position, Record, Source

_T = TypeVar("_T")

# Text in memory, in characters, token ids or messages.
_MOST_TEXT = 1 << 26

# Records of which the place is known, at 24 bytes each.
_MOST_SPOTS = 1 << 24

_Key = tuple[int, Spot]  # a file, and where its reading began


class Spots(Generic[_T]):
    """Reads each file once for all domains and epochs, so that a short domain costs no pass.

    What is found stays in memory. Of too much text the oldest is let go, and read again at its
    place in the file. Files that cannot be read from their middle (packed ones, Parquet), or are at
    an address, are held whole; of too much the largest domains are let go, as they come to their
    end last, and of too many places all. These are ``long`` from then on, and their readings end.

    Args:
        source: The files.
        hold: Returns what a record holds; None if that is nothing.
        measure: Returns the domain of what a record holds, and its size.
        cursors: Epoch and position where each domain goes on.
    """

    def __init__(
        self,
        source: Source,
        hold: Callable[[Record, str], _T | None],
        measure: Callable[[_T], tuple[str, int]],
        cursors: Mapping[str, tuple[int, Position | None]],
    ) -> None:
        """Read nothing yet."""
        self.found: set[str] = set()
        """Domains that were met."""
        self.cursors = dict(cursors)
        self.long: dict[str, dict[str, tuple[int, Position | None]]] = {}
        """Domains that were let go, each with the cursors then of all those that were with it."""
        self._source, self._hold, self._measure = source, hold, measure
        self._begins = _begins(source, cursors)
        self._scans: dict[_Key, Iterator[tuple[str, Record, Spot]]] = {}
        self._ends: dict[_Key, Spot] = {}
        self._spots: defaultdict[tuple[_Key, str], array[int]] = defaultdict(lambda: array("q"))
        self._count = 0
        self._kept: dict[tuple[int, int], tuple[str, _T, Spot]] = {}
        self._held: dict[tuple[int, int], tuple[str, _T, Spot]] = {}
        self._size = 0

    def of(self, domain: str, epoch: int, position: Position | None) -> Iterator[Item[_T]]:
        """Yield the items of a domain in an epoch, from a position on."""
        files = self._source.files(epoch)
        assert files is not None, "whoever makes this has asked"
        first, begin = self._source.spot(position) if position else (0, Spot())
        for number, file in enumerate(files[first:], start=first):
            start = begin if number == first else Spot()
            key = file, self._begins.get(file, Spot()) if start.record else Spot()
            for before in self._befores(key, domain):
                if before.record >= start.record:
                    place, held, after = self._item(file, domain, before)
                    at = self._source.position(epoch, number, after)
                    self.cursors[domain] = epoch, at
                    yield place, held, at
            if domain in self.long:
                return

    def _befores(self, key: _Key, domain: str) -> Iterator[Spot]:
        """Yield the places before the domain's records."""
        taken = 0
        while domain not in self.long:
            spots = self._spots[key, domain]
            if taken < len(spots):
                record, byte, line = spots[taken : taken + 3]
                taken += 3
                yield Spot(record, byte if byte >= 0 else None, line)
            elif not self._advance(key):
                return

    def _advance(self, key: _Key) -> bool:
        """Read one record of a file; False at its end."""
        file, begin = key
        if key not in self._scans:
            self._scans[key] = self._source.read_file(file, begin)
        before = self._ends.get(key, begin)
        if (item := next(self._scans[key], None)) is None:
            return False
        place, record, after = item
        self._ends[key] = after
        if (held := self._hold(record, place)) is None:
            return True
        domain, size = self._measure(held)
        self.found.add(domain)
        if domain in self.long:
            return True
        byte = -1 if before.byte is None else before.byte
        self._spots[key, domain].extend((before.record, byte, before.line))
        self._count += 1
        again = after.byte is not None and self._source.is_here(file)
        texts = self._kept if again else self._held
        if (file, before.record) not in texts:
            texts[file, before.record] = place, held, after
            self._size += size
        while self._size > _MOST_TEXT and self._kept:
            _, oldest, _ = self._kept.pop(next(iter(self._kept)))
            self._size -= self._measure(oldest)[1]
        if self._count > _MOST_SPOTS:
            self._let_go(self.cursors.keys() - self.long)
        elif self._size > _MOST_TEXT:
            self._let_go(self._largest(_MOST_TEXT // 8))
        return True

    def _largest(self, most: int) -> set[str]:
        """Return the largest domains without which no more is held than that."""
        sizes = Counter[str]()
        for _, held, _ in self._held.values():
            domain, size = self._measure(held)
            sizes[domain] += size
        total, largest = sizes.total(), set[str]()
        for domain, size in sizes.most_common():
            if total > most:
                largest.add(domain)
                total -= size
        return largest

    def _let_go(self, domains: set[str]) -> None:
        together = {domain: self.cursors[domain] for domain in domains}
        for domain in domains:
            self.long[domain] = together
        for key in [key for key in self._spots if key[1] in domains]:
            self._count -= len(self._spots.pop(key)) // 3
        for texts in (self._kept, self._held):
            for key, (_, held, _) in [*texts.items()]:
                domain, size = self._measure(held)
                if domain in domains:
                    self._size -= size
                    del texts[key]
        if len(self.long) == len(self.cursors):
            self._scans.clear()

    def _item(self, file: int, domain: str, before: Spot) -> tuple[str, _T, Spot]:
        """Return the record after a place, with the place after it."""
        key = file, before.record
        if kept := self._held.get(key) or self._kept.get(key):
            return kept
        nothing: tuple[str, Record | None, Spot] = self._source.where, None, before
        place, record, after = next(self._source.read_file(file, before, again=True), nothing)
        held = None if record is None else self._hold(record, place)
        if held is None or self._measure(held)[0] != domain:
            msg = (
                f"{place}: no longer the record that was there: the file has "
                "changed; restart the run"
            )
            raise ValueError(msg)
        return place, held, after


def _begins(source: Source, cursors: Mapping[str, tuple[int, Position | None]]) -> dict[int, Spot]:
    """Return the files that are not needed from their beginning at first, and from where on."""
    begins: dict[int, Spot] = {}
    whole: set[int] = set()
    for epoch, position in cursors.values():
        files = source.files(epoch) or []
        number, spot = source.spot(position) if position else (0, Spot())
        if position is None:
            whole.update(files[:1])
        elif number < len(files):
            file = files[number]
            begins[file] = min(begins.get(file, spot), spot, key=lambda s: s.record)
    return {file: spot for file, spot in begins.items() if file not in whole}
