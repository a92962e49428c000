"""Where `OverRanks` is promised to be found; it needs nothing of torchtitan."""

from weighting.ranks import OverRanks

__all__ = ["OverRanks"]
