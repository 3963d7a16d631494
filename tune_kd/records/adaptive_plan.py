"""How the plan of a study that is tuned grows: what was drawn, and what is confirmed of it, from what is on record."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tune_kd.records.schema import Row, first_row
from tune_kd.study.plan import Plan, Search
from tune_kd.study.spec import CELL_FIELDS
from tune_kd.study.trial import UNENDED, Phase, Trial
from tune_kd.study.tuning import Tuning


def draws(search: Search, rows: Iterable[Row]) -> list[Row]:
    """An arm's draws, in their order."""
    return [row for row in rows if row["phase"] == "screen" and row["arm"] == search.name]


def drawn(planned: Plan, search: Search, values: Mapping[str, float]) -> Trial:
    """The trial of a draw: its arm's published default in all else, at the screen's seed."""
    default = next(trial for trial in planned.trials if trial.arm == search.default)
    return replace(_with(default, values), arm=search.name, phase=Phase.SCREEN, seed=planned.study.screen.seed)


def confirmed(planned: Plan, search: Search, best: Row) -> list[Trial]:
    """The trials that confirm a draw, beside those of the default, on the same seeds and with the same teachers."""
    defaults = [trial for trial in planned.trials if trial.arm == search.default]
    return [replace(_with(trial, values(search, best)), arm=search.tuned) for trial in defaults]


def values(search: Search, row: Row) -> dict[str, float]:
    """What was drawn, by the names of the ranges."""
    return {each.name: row[each.name] for each in search.ranges}


def is_due(tuning: Tuning, theirs: Sequence[Row]) -> bool:
    """Whether another draw of an arm is to be made now. Its budget counts what failed, as the others' does."""
    return sum(row["status"] in UNENDED for row in theirs) < tuning.parallel and left(tuning, theirs) > 0


def left(tuning: Tuning, theirs: Sequence[Row]) -> int:
    """What is left of an arm's budget, in its unit; nothing where a failed teacher blocks the arm. Below zero where the
    last draw of a budget of epochs, which is made as long as one is left, took more."""
    if any(row["status"] == "blocked" for row in theirs):
        return 0
    if tuning.budget_unit == "trials":
        return tuning.budget - len(theirs)
    return tuning.budget - sum(map(_epochs, theirs))


def _epochs(row: Row) -> int:
    """What a draw takes of a budget of epochs: all of its own until it has ended; the one in which it failed, too."""
    return int(row["epochs_planned"] if row["status"] in UNENDED else row["epochs_run"] + (row["status"] == "failed"))


def best(tuning: Tuning, theirs: Sequence[Row]) -> Row | None:
    """The draw with the highest validation accuracy, of equal ones the first, once an arm's budget is spent; null
    before, and where none ran to its end."""
    if is_due(tuning, theirs) or any(row["status"] in UNENDED for row in theirs):
        return None
    ended = [row for row in theirs if row["status"] == "completed"]
    return max(ended, key=lambda row: float(row["val_accuracy_best"]), default=None)


def grown(planned: Plan, rows: Sequence[Row]) -> Plan:
    """The plan with what these rows of the ledger's trials say was drawn, and with what follows from it."""
    tuning, more = planned.study.tuning, []
    for search in planned.searches:
        assert tuning is not None
        theirs = draws(search, rows)
        more += [drawn(planned, search, values(search, row)) for row in theirs]
        if (found := best(tuning, theirs)) is not None:
            more += confirmed(planned, search, found)
    students = (trial for trial in planned.trials if trial.role == "student")
    # Draws come one after another, so that they are the longest way to the end, and defaults can wait.
    return replace(planned, trials=(*planned.teachers, *more, *students)) if more else planned


def to_come(planned: Plan, rows: Sequence[Row] = ()) -> list[Trial]:
    """At most what the plan will still grow by, with the defaults in the place of what is not drawn yet."""
    tuning, found = planned.study.tuning, []
    for search in planned.searches:
        assert tuning is not None
        theirs = draws(search, rows)
        size = 1 if tuning.budget_unit == "trials" else planned.study.recipe.epochs
        found += [drawn(planned, search, {})] * -(-max(0, left(tuning, theirs)) // size)
        goes_on = left(tuning, theirs) > 0 or any(row["status"] in UNENDED for row in theirs)
        if goes_on:
            found += [replace(each, arm=search.tuned) for each in planned.trials if each.arm == search.default]
    return found


def with_those_to_come(planned: Plan, run: str, rows: list[Row]) -> list[Row]:
    """Rows of trials, and of those that a study that is tuned has still to draw: what people are to see of a run."""
    return rows + [first_row(run, trial) for trial in to_come(planned, rows)]


def _with(trial: Trial, values: Mapping[str, float]) -> Trial:
    """The trial with these settings."""
    cell: dict[str, Any] = {name: value for name, value in values.items() if name in CELL_FIELDS}
    recipe: dict[str, Any] = {name: value for name, value in values.items() if name not in CELL_FIELDS}
    return replace(
        trial,
        cell=replace(trial.cell, **cell),
        recipe=replace(trial.recipe, **recipe),
        drawn=tuple(values.items()),
    )
