"""What each example had at every visit, as a list, for the stages that remember examples."""

import math


class Visits:
    """A number of each example, visit by visit: the mean over its tokens."""

    def __init__(self, of_tokens, of_visits):
        """Begin without a visit.

        Args:
            of_tokens: From signals to a number for each token, [B, L].
            of_visits: From the numbers of an example so far to its score.
        """
        self.history = {}
        self._of_tokens, self._of_visits = of_tokens, of_visits

    def add(self, signals):
        """Add a batch; return the score of each token's example, 0 at tokens that do not count."""
        numbers, valid = self._of_tokens(signals).tolist(), signals.valid.tolist()
        examples = signals.columns["example"].int().tolist()
        here = {}
        for xs, oks, row in zip(numbers, valid, examples, strict=True):
            for x, ok, example in zip(xs, oks, row, strict=True):
                if ok:
                    here.setdefault(example, []).append(x)
        for example, xs in here.items():
            self.history.setdefault(example, []).append(math.fsum(xs) / len(xs))
        return [
            [self.score(example) if ok else 0.0 for example, ok in zip(row, oks, strict=True)]
            for row, oks in zip(examples, valid, strict=True)
        ]

    def score(self, example):
        """Return that of one example."""
        return self._of_visits(self.history[example])
