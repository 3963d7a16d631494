"""How long trials take, by those that ran: the pace of comparable ones, else of all."""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]  # of the table of trials


def pace(rows: Sequence[Row]) -> Callable[[Row], float] | None:
    """Training seconds that an epoch of a trial takes, as a function of its row; null before any trial has run one."""
    totals: dict[Any, list[float]] = {}
    for row in rows:
        if row["epochs_run"] and row["train_seconds"]:
            for kind in (_kind(row), None):
                totals.setdefault(kind, []).append(row["train_seconds"] / row["epochs_run"])
    if not totals:
        return None  # also where all that ended so far was adopted, or took no time at all
    means = {kind: sum(each) / len(each) for kind, each in totals.items()}
    return lambda row: means.get(_kind(row), means[None])


def time_left(rows: Sequence[Row]) -> float | None:
    """Seconds that the rest will take over the slots in use; null before the first trial has ended."""
    seconds = pace(rows)
    if seconds is None or not any(row["status"] == "completed" for row in rows):
        return None
    left = sum(
        (row["epochs_planned"] - row["epochs_run"]) * seconds(row)
        for row in rows
        if row["status"] in ("pending", "running")
    )
    slots = sum(row["status"] == "running" for row in rows)
    return float(left / max(1, slots))


def _kind(row: Row) -> tuple[Any, ...]:
    return row["role"], row["stem"], row["method"]
