"""A source of hidden states, for the tests that ask what it is given."""

import weighting as wt
from weighting import registry


def length_of_hidden(monkeypatch):
    """Register it for a test alone, and return its class."""
    monkeypatch.setattr(registry, "_STAGES", dict(registry.stages()))

    @wt.stage("length_of_hidden")
    class LengthOfHidden(wt.Source):
        """Read how long the vector is from which a token is predicted."""

        needs = frozenset({"hidden"})
        pointwise = True

        def read(self, signals, _scope):
            """Return a length for each token, [T]."""
            return signals.hidden.norm(dim=-1)

    return LengthOfHidden
