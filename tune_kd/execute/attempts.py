"""How often a trial is tried again: only after failures that say little about the trial itself."""

from collections import Counter

from tune_kd.execute.worker import Failure
from tune_kd.records.schema import Row

MAX_ATTEMPTS = 3  # of one trial under one driver without a new epoch in between


class Attempts:
    """The failed attempts of each trial since its last new epoch, by reason."""

    def __init__(self) -> None:
        self._failed: dict[str, Counter[str]] = {}

    def got_on(self, trial_id: str) -> None:
        """Note that a trial has a new epoch: it may lose its worker again."""
        self._failed.pop(trial_id, None)

    def again(self, row: Row, failure: Failure) -> bool:
        """Whether the trial of a row is tried again. Doubles its GPU share where memory ran out."""
        failed = self._failed.setdefault(row["trial_id"], Counter())
        failed[failure.reason] += 1
        if failed[failure.reason] >= MAX_ATTEMPTS:
            return False
        if failure.reason == "out_of_memory" and 0 < row["gpu_fraction"] < 1:
            row["gpu_fraction"] = min(1.0, 2 * row["gpu_fraction"])
            return True
        return failure.reason in ("lost", "storage")
