"""Records that cannot be used: refused at the first, or counted and passed over."""

from typing import Literal

from torchtitan.tools.logging import logger

from weighting.errors import printable

OnBadRecord = Literal["refuse", "skip"]

# More messages of one kind would bury the first.
_FEW = 3


class BadRecordError(ValueError):
    """A record cannot be used; the message names its place and the reason."""


class BadRecords:
    """What becomes of records that cannot be used, and how many there were.

    A file that cannot be read to its end is no bad record, and is refused in any case.
    """

    def __init__(
        self, on_bad_record: OnBadRecord = "refuse", count: int = 0, *, quiet: bool = False
    ) -> None:
        """Start with none."""
        self.count = count
        self._quiet = quiet
        self._refuse = on_bad_record == "refuse"

    def found(self, error: ValueError) -> None:
        """Count a record that was passed over; the first few are said at once.

        Raises:
            ValueError: The error, if bad records are refused.
        """
        if self._refuse:
            raise ValueError(str(error)) from error
        self.count += 1
        if self.count <= _FEW and not self._quiet:
            more = "; further ones are counted" if self.count == _FEW else ""
            logger.warning(printable(f"Passed over a bad record: {error}{more}"))
