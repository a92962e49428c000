"""One reading of a stream's epoch, from which every domain takes its own records."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from titan_integration.data.stream_sources import Position

_T = TypeVar("_T")

Item = tuple[str, _T, Position]
"""A place, what a record there holds, and the position after it."""

# What waits for all domains together, in characters, token ids or messages.
_MOST_WAITING = 1 << 26


class OneReading(Generic[_T]):
    """Reads on when a domain has none left, and keeps what it finds of others for them.

    Where one domain is drawn far more often than the data has it, the others' records pile up. Of
    too many those of the largest pile are dropped, and their domain reads on for itself.

    Args:
        read: Yields items from a position on.
        measure: Returns the domain of what a record holds, and its size.
        order: Places positions in a row.
        starts: Position of each domain that takes part; None for the beginning.
    """

    def __init__(
        self,
        read: Callable[[Position | None], Iterator[Item[_T]]],
        measure: Callable[[_T], tuple[str, int]],
        order: Callable[[Position | None], tuple[int, ...]],
        starts: Mapping[str, Position | None],
    ) -> None:
        """Read nothing yet."""
        self.found: set[str] = set()
        """Domains that were met."""
        self._read, self._measure, self._order = read, measure, order
        self._floors = {domain: order(start) for domain, start in starts.items()}
        self._items = read(min(starts.values(), key=order))
        self._waiting: defaultdict[str, deque[tuple[int, Item[_T]]]] = defaultdict(deque)
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._total = 0

    def of(self, domain: str, position: Position | None) -> Iterator[Item[_T]]:
        """Yield the items of a domain from a position on, which is where it starts."""
        while domain in self._floors:
            if waiting := self._waiting[domain]:
                size, item = waiting.popleft()
                self._sizes[domain] -= size
                self._total -= size
                position = item[2]
                yield item
            elif not self._advance():
                return
        for item in self._read(position):
            if self._measure(item[1])[0] == domain:
                yield item

    def _advance(self) -> bool:
        """Read one item; False at the end."""
        item: Any = next(self._items, None)
        if item is None:
            return False
        domain, size = self._measure(item[1])
        self.found.add(domain)
        if domain in self._floors and self._order(item[2]) > self._floors[domain]:
            self._waiting[domain].append((size, item))
            self._sizes[domain] += size
            self._total += size
            if self._total > _MOST_WAITING and len(self._waiting[domain]) > 1:
                largest = max(self._sizes, key=self._sizes.__getitem__)
                self._total -= self._sizes[largest]
                del self._floors[largest], self._waiting[largest], self._sizes[largest]
        return True
