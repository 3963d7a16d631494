"""Estimate training time from trials that ran: those of the same kind if there are any, otherwise all."""

from collections.abc import Callable, Sequence
from typing import Any

from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import UNENDED, Status


def pace(rows: Sequence[TrialRow]) -> Callable[[TrialRow], float] | None:
    """Return a function from a trial's row to its training seconds per epoch. None before any trial ran an epoch."""
    totals: dict[Any, list[float]] = {}
    for row in rows:
        if row["epochs_run"] and row["train_seconds"]:
            for kind in (_kind(row), None):
                totals.setdefault(kind, []).append(row["train_seconds"] / row["epochs_run"])
    if not totals:
        return None  # also if every ended trial was adopted or took no time
    means = {kind: sum(each) / len(each) for kind, each in totals.items()}
    return lambda row: means.get(_kind(row), means[None])


def time_left(rows: Sequence[TrialRow]) -> float | None:
    """Return the estimated seconds for the remaining trials on the slots in use. None before a trial has completed."""
    seconds = pace(rows)
    if seconds is None or not any(row["status"] == Status.COMPLETED for row in rows):
        return None
    left = sum((row["epochs_planned"] - row["epochs_run"]) * seconds(row) for row in rows if row["status"] in UNENDED)
    slots = sum(row["status"] == Status.RUNNING for row in rows)
    return float(left / max(1, slots))


def _kind(row: TrialRow) -> tuple[Any, ...]:
    return row["role"], row["stem"], row["method"]
