"""Retries of failed trials, for failures that the trial itself probably did not cause."""

from collections import Counter
from dataclasses import replace

from tune_kd.execute.worker import Failure
from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import StopReason

MAX_ATTEMPTS = 3  # failures of a trial for the same reason without a new epoch, under one driver
MAX_INNOCENT = 20  # failures of a trial that other trials caused, without a new epoch, before they count


class Attempts:
    """Counts the failed attempts of each trial since its last new epoch, by reason."""

    def __init__(self) -> None:
        self._failed: dict[str, Counter[str]] = {}

    def got_on(self, trial_id: str) -> None:
        """Reset the counts of a trial that has a new epoch."""
        self._failed.pop(trial_id, None)

    def weighed(self, trial_id: str, failure: Failure) -> Failure:
        """Return a failure with the reason that counts. A failure caused by another trial on the same GPU ("mps") does
        not count; after `MAX_INNOCENT` of them, it counts as a lost worker."""
        if failure.reason != "mps":
            return failure
        ended = self._failed.setdefault(trial_id, Counter())
        ended["mps"] += 1
        return failure if ended["mps"] <= MAX_INNOCENT else replace(failure, reason="lost")

    def again(self, row: TrialRow, failure: Failure) -> bool:
        """Count a failure and return whether the trial is retried. Doubles its GPU share in `row` after an
        out-of-memory error."""
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
