"""Ends of attempts: their messages, and retries of failures that the trial itself probably did not cause."""

import math
from collections import Counter
from dataclasses import replace

from tune_kd.execute.worker import Failure
from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import Phase, Status, StopReason, Trial

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


def ending(trial: Trial, row: TrialRow) -> str:
    """Return the message about the end of a trial or an attempt.

    Only teachers and confirmed trials show a test accuracy. The others are still to be compared with each other.
    """
    text = f"{trial.label} ({trial.phase}) {row['status']}"
    if row["test_accuracy_best"] is not None and row["val_accuracy_best"] is not None:
        if trial.phase == Phase.TEACHER and (row["train_seconds"] or 0.0) > (row["wall_seconds"] or math.inf):
            text = f"{trial.label} ({trial.phase}) reused from another run"
        accuracy = f"validation accuracy {100 * row['val_accuracy_best']:.2f} %"
        if trial.phase in (Phase.TEACHER, Phase.CONFIRM):
            accuracy = f"test accuracy {100 * row['test_accuracy_best']:.2f} %"
        return f"{text}: {accuracy}, {row['train_seconds']:.1f} s of training"
    if row["error"]:
        return f"{text} ({row['stop_reason'] or 'will be retried'}): {row['error']}"
    return f"{text} (will be retried): another trial on its GPU ended it" if row["status"] == Status.PENDING else text
