"""Adapt tables that another tool wrote: map their columns and derive the missing ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tune_kd.study.arms import level_name
from tune_kd.study.trial import Phase, Role, Status
from tune_kd.system.errors import raise_problems

if TYPE_CHECKING:
    import pandas as pd

PHASES = tuple(Phase)
LEVELS = ("student", "teacher", "stem", "weights", "width", "method", "temperature", "alpha", "beta")
# Part of an arm's name where trials with different settings would otherwise share an arm.
CONDITIONS = ("lr", "weight_decay", "recipe_id", "dataset", "scale", "epochs_planned")


@dataclass(frozen=True)
class Adapter:
    """How to read tables that no run of `tune_kd` wrote.

    A trials table needs `trial_id` and `seed`, an epochs table `trial_id`, `epoch` and `val_accuracy`. Other columns
    are optional; missing ones become null. These are derived if they are missing: `run` (name of the files), `role`
    (from the phase), `epochs_planned` (the epochs that ran), `status` (completed, or stopped if fewer epochs ran than
    planned), and `arm` (the levels in which students differ).
    """

    columns: Mapping[str, str] = field(default_factory=dict)  # maps their column names to ours
    phases: Mapping[str, str] = field(default_factory=dict)  # maps their phases to teacher, screen or confirm
    rest: str | None = None  # phase for all unmapped phases; None rejects them

    def apply(self, run: str, tables: "dict[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
        """Return the tables with our column names and the derived columns.

        Raises `ValueError` if two columns get the same name, or if no row has a mapped phase.
        """
        named = {name: table.rename(columns=dict(self.columns)) for name, table in tables.items()}
        for name, table in named.items():
            if not table.columns.is_unique:
                twice = ", ".join(map(str, table.columns[table.columns.duplicated()]))
                raise ValueError(f"{name} has more than one column {twice}")
        for name in ("trials", "epochs"):
            if "run" not in named[name]:
                named[name] = named[name].assign(run=run)
        trials = named["trials"]
        trials = trials.assign(phase=self._phases(trials["phase"]) if "phase" in trials else Phase.CONFIRM)
        if "role" not in trials:
            taught = trials["phase"].isin([Phase.TEACHER])
            trials = trials.assign(role=[Role.TEACHER if each else Role.STUDENT for each in taught])
        if "epochs_planned" not in trials and "epochs_run" in trials:
            trials = trials.assign(epochs_planned=trials["epochs_run"])
        if "status" not in trials:
            trials = _with_status(trials)
        if "arm" not in trials:
            trials = trials.assign(arm=_arms(trials))
        return {**named, "trials": trials}

    def _phases(self, theirs: "pd.Series[Any]") -> "pd.Series[Any]":
        """Map their phases to ours."""
        if unknown := sorted(set(self.phases) - set(theirs)):
            there = ", ".join(map(repr, theirs.dropna().unique()))
            raise ValueError(f"no trial has the phase {', '.join(map(repr, unknown))}; there are {there}")
        phases = theirs.replace(dict(self.phases))
        return phases if self.rest is None else phases.where(phases.isin(PHASES), self.rest)


def parse_phases(settings: Sequence[str]) -> dict[str, str]:
    """Parse the values of `--phase THEIRS=OURS`. Raises `UserError`."""
    problems, found = [], {}
    for setting in settings:
        theirs, sign, ours = setting.partition("=")
        if not theirs or not sign or ours not in PHASES:
            problems.append(f"--phase is {setting!r}; allowed: THEIRS=OURS, where OURS is {', '.join(PHASES)}")
        found[theirs] = ours
    raise_problems(problems)
    return found


def _with_status(trials: "pd.DataFrame") -> "pd.DataFrame":
    """Add `status`: completed, or stopped for trials that ran fewer epochs than planned. Null the latter's accuracy."""
    if "epochs_run" not in trials:
        return trials.assign(status=Status.COMPLETED)
    short = (trials["epochs_run"] < trials["epochs_planned"]).fillna(False).astype(bool)
    final = [name for name in ("test_accuracy", "test_accuracy_best") if name in trials]
    return trials.assign(
        status=[Status.STOPPED if each else Status.COMPLETED for each in short],
        **{name: trials[name].mask(short) for name in final},
    )


def _arms(trials: "pd.DataFrame") -> list[str]:
    """Return each trial's arm, such as `cifar/logit/T=4`: its levels in the columns in which students differ."""
    import pandas as pd

    students = trials[trials["role"] == Role.STUDENT]
    named = [name for name in LEVELS if name in trials and students[name].nunique(dropna=False) > 1]
    for name in CONDITIONS:
        apart = students.groupby(named, dropna=False) if named else students.groupby(lambda _: 0)
        if name in trials and (apart[name].nunique() > 1).any():
            named.append(name)
    arms = []
    for row in trials[named].to_dict("records"):
        levels = [level_name(str(name), level) for name, level in row.items() if pd.notna(level)]
        arms.append("/".join(levels) or "all")
    return arms
