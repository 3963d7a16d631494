"""Retries of failed trials: only after failures that are probably not caused by the trial itself."""

from collections import Counter
from dataclasses import replace

from tune_kd.execute.worker import Failure
from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import StopReason

MAX_ATTEMPTS = 3  # attempts of a trial that fail for the same reason without a new epoch, under one driver
MAX_INNOCENT = 20  # attempts that other trials end, in a row without a new epoch, before they count


class Attempts:
    """Counts the failed attempts of each trial since its last new epoch, by reason."""

    def __init__(self) -> None:
        self._failed: dict[str, Counter[str]] = {}

    def got_on(self, trial_id: str) -> None:
        """Reset the counts of a trial that has a new epoch."""
        self._failed.pop(trial_id, None)

    def weighed(self, trial_id: str, failure: Failure) -> Failure:
        """Return a failure as it counts: one that another trial on the same GPU caused does not, unless that happens
        so often that nothing gets on; then it is a lost worker's."""
        if failure.reason != "mps":
            return failure
        ended = self._failed.setdefault(trial_id, Counter())
        ended["mps"] += 1
        return failure if ended["mps"] <= MAX_INNOCENT else replace(failure, reason="lost")

    def again(self, row: TrialRow, failure: Failure) -> bool:
        """Count a failure and return whether the trial is tried again. After an out-of-memory error, its GPU share in
        `row` is doubled."""
        if failure.reason == "mps":
            return True
        failed = self._failed.setdefault(row["trial_id"], Counter())
        failed[failure.reason] += 1
        if failed[failure.reason] >= MAX_ATTEMPTS:
            return False
        if failure.reason == StopReason.OUT_OF_MEMORY and 0 < (share := row["gpu_fraction"] or 0.0) < 1:
            row["gpu_fraction"] = min(1.0, 2 * share)
            return True
        return failure.reason in ("lost", "storage")
