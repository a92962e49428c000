"""A weighting's entry of a checkpoint: the state of its stages, and what that belongs to."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import override

from titan_integration.state.draws import PROPORTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from titan_integration.state.run import Run

RECORD = ("spec_hash", "spec", "domains")
"""Keys that say what a saved state belongs to; all others are the stages' own."""


class SavedWeighting(Stateful):
    """Saves and loads the state of a run's weighting."""

    def __init__(self, run: Run, *, allow_changed_spec: bool = False) -> None:
        self._run = run
        self._allow_changed_spec = allow_changed_spec

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stages, and what it belongs to; every rank must call it."""
        state = {name: self._run.from_last(x) for name, x in self._run.fn.state_dict().items()}
        draws = self._run.draws
        if draws is not None and draws.late:
            state[PROPORTIONS] = draws.coming
        return {**self._record(), **state}

    def draw_at_once(self) -> None:
        """Draw data as version 0.1.0 did, which saved no proportions."""
        if self._run.draws is not None:
            self._run.draws.late = False

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the stages, unless it is another spec's, as `accepts` tells.

        Raises:
            ValueError: As `accepts`; or the state is none that the stages could be in.
        """
        state = dict(state_dict)
        if not self.accepts({key: state.pop(key) for key in RECORD if key in state}):
            return
        coming = state.pop(PROPORTIONS, None)
        try:
            self._run.fn.load_state_dict(state)
            if coming is not None and self._run.draws is not None:
                self._run.draws.load(coming)
        except ValueError as error:
            msg = (
                f"{error}. An earlier checkpoint: --checkpoint.load_step N; the weighting afresh: "
                "--checkpoint.exclude_from_loading weighting"
            )
            raise ValueError(msg) from error

    def accepts(self, record: Mapping[str, str]) -> bool:
        """Tell whether a saved state is of this spec; False where another one is allowed.

        Args:
            record: What `state_dict` has under the keys in `RECORD`.

        Raises:
            ValueError: It is of another spec and that was not allowed, or of other domains.
        """
        now = self._record()
        if record["spec_hash"] != now["spec_hash"]:
            if not self._allow_changed_spec:
                raise ValueError(_changed(record["spec"], now["spec"]))
            return False
        if record.get("domains", now.get("domains")) != now.get("domains"):
            msg = (
                f"the weighting in the checkpoint remembers the domains {record['domains']}, and "
                f"the data now has {now['domains']}. Restore the data, or start both afresh: "
                "--checkpoint.exclude_from_loading weighting,dataloader"
            )
            raise ValueError(msg)
        return True

    def _record(self) -> dict[str, str]:
        """Return what the state belongs to; the domains only where it may be one for each."""
        fn = self._run.fn
        record = {"spec_hash": fn.spec.hash, "spec": str(fn.spec)}
        by_domain = "domain_ids" in fn.needs or fn.plan.moves_domains
        if by_domain and fn.state_dict():
            record["domains"] = ", ".join(fn.domains)
        return record


def _changed(saved: str, now: str) -> str:
    """Say how two specs differ, line by line, and what to do."""
    # All lines, so that the old spec can be restored from the message.
    lines = difflib.unified_diff(
        saved.splitlines(),
        now.splitlines(),
        "in the checkpoint",
        "now",
        n=len(saved) + len(now),
        lineterm="",
    )
    diff = "\n".join(lines) or "Both print alike, and only their hashes differ: it is damaged."
    return (
        f"the checkpoint was trained with another weighting spec.\n{diff}\n"
        "Resume with the old one, or pass --weighting.allow_changed_spec to go on with the new one "
        "from fresh state."
    )
