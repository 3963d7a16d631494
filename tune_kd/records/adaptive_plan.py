"""The growing plan of a tuned study: derive the drawn trials and their confirmation from the recorded rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tune_kd.records.schema import TrialRow, first_row
from tune_kd.study.plan import Plan, Search
from tune_kd.study.spec import RECIPE_FACTORS
from tune_kd.study.trial import UNENDED, Phase, Role, Row, Status, Trial, level_in
from tune_kd.study.tuning import Tuning

Draw = Callable[..., dict[str, float]]  # `tune_kd.study.sampler.draw`


def draws(search: Search, rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Return an arm's draws in order."""
    return [row for row in rows if row["phase"] == Phase.SCREEN and row["arm"] == search.name]


def due(planned: Plan, search: Search, rows: Mapping[str, TrialRow], draw: Draw) -> Iterator[Trial]:
    """Yield the trials that a tuned arm adds now: further draws, or the confirmation of its best draw.

    The caller must add each trial to `rows`, by trial id, before it asks for the next. `draw` belongs to the sampler.
    """
    tuning = planned.study.tuning
    assert tuning is not None
    default = defaults(planned, search)
    while is_due(tuning, theirs := draws(search, rows.values())):
        yield drawn(planned, search, draw(tuning, search.name, search.ranges, default, theirs))
    if (found := best(tuning, theirs)) is not None:
        yield from confirmed(planned, search, found)


def defaults(planned: Plan, search: Search) -> dict[str, float]:
    """Return the published values of the settings that are drawn for an arm."""
    method = next(arm.cell.method for arm in planned.arms if arm.name == search.default)
    return {each.name: float(planned.study.value(each.name, method) or 0.0) for each in search.ranges}


def drawn(planned: Plan, search: Search, values: Mapping[str, float]) -> Trial:
    """Return the trial of a draw: the arm's default trial with the drawn values and the screen's seed."""
    default = next(trial for trial in planned.trials if trial.arm == search.default)
    return replace(_with(default, values), arm=search.name, phase=Phase.SCREEN, seed=planned.study.screen.seed)


def confirmed(planned: Plan, search: Search, best: TrialRow) -> list[Trial]:
    """Return the trials that confirm a draw. They have the seeds and teachers of the default's trials."""
    defaults = [trial for trial in planned.trials if trial.arm == search.default]
    return [replace(_with(trial, values(search, best)), arm=search.tuned) for trial in defaults]


def values(search: Search, row: Row) -> dict[str, float]:
    """Return the drawn values by the names of their ranges."""
    return {each.name: level_in(row, each.name) for each in search.ranges}


def is_due(tuning: Tuning, theirs: Sequence[TrialRow]) -> bool:
    """Return whether an arm needs another draw now. Failed draws count against the budget."""
    return sum(row["status"] in UNENDED for row in theirs) < tuning.parallel and left(tuning, theirs) > 0


def left(tuning: Tuning, theirs: Sequence[TrialRow]) -> int:
    """Return the remaining budget of an arm, in its unit; 0 if a failed teacher blocks the arm.

    The last draw may exceed a budget in epochs; the result is then negative.
    """
    if any(row["status"] == Status.BLOCKED for row in theirs):
        return 0
    if tuning.budget_unit == "trials":
        return tuning.budget - len(theirs)
    return tuning.budget - sum(map(_epochs, theirs))


def _epochs(row: TrialRow) -> int:
    """Return the epochs that a draw costs: its planned epochs until it ends, then the epochs that it began."""
    return row["epochs_planned"] if row["status"] in UNENDED else row["epochs_run"] + (row["status"] == Status.FAILED)


def best(tuning: Tuning, theirs: Sequence[TrialRow]) -> TrialRow | None:
    """Return the draw with the highest validation accuracy; the first one in a tie.

    Returns None until the arm's budget is spent, or if no draw completed.
    """
    if is_due(tuning, theirs) or any(row["status"] in UNENDED for row in theirs):
        return None
    ended = [row for row in theirs if row["status"] == Status.COMPLETED]
    return max(ended, key=lambda row: row["val_accuracy_best"] or 0.0, default=None)


def grown(planned: Plan, rows: Sequence[TrialRow]) -> Plan:
    """Return the plan with the draws in these rows, and with the trials that confirm the best draws."""
    tuning, more = planned.study.tuning, []
    for search in planned.searches:
        assert tuning is not None
        theirs = draws(search, rows)
        more += [drawn(planned, search, values(search, row)) for row in theirs]
        if (found := best(tuning, theirs)) is not None:
            more += confirmed(planned, search, found)
    students = (trial for trial in planned.trials if trial.role == Role.STUDENT)
    # Draws depend on one another, so they are the critical path and run before the defaults.
    return replace(planned, trials=(*planned.teachers, *more, *students)) if more else planned


def to_come(planned: Plan, rows: Sequence[TrialRow] = ()) -> list[Trial]:
    """Return the trials that the plan can still add at most, with default values for future draws."""
    tuning, found = planned.study.tuning, []
    for search in planned.searches:
        assert tuning is not None
        theirs = draws(search, rows)
        another = drawn(planned, search, {})
        size = 1 if tuning.budget_unit == "trials" else another.recipe.epochs
        found += [another] * -(-max(0, left(tuning, theirs)) // size)
        goes_on = left(tuning, theirs) > 0 or any(row["status"] in UNENDED for row in theirs)
        if goes_on:
            found += [replace(each, arm=search.tuned) for each in planned.trials if each.arm == search.default]
    return found


def with_those_to_come(planned: Plan, run: str, rows: list[TrialRow]) -> list[TrialRow]:
    """Return the rows, and rows for the trials that a tuned study has yet to draw, for display."""
    return rows + [first_row(run, trial) for trial in to_come(planned, rows)]


def _with(trial: Trial, values: Mapping[str, float]) -> Trial:
    """Return the trial with these settings."""
    cell = trial.cell
    recipe: dict[str, Any] = {name: value for name, value in values.items() if name in RECIPE_FACTORS}
    for name in values.keys() - recipe.keys():
        cell = cell.at(name, values[name])
    return replace(trial, cell=cell, recipe=replace(trial.recipe, **recipe), drawn=tuple(values.items()))
