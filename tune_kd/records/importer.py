"""Somebody else's tables: what their columns mean, and what they leave to be made from the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tune_kd.study.arms import level_name
from tune_kd.system.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PHASES = ("teacher", "screen", "confirm")
LEVELS = ("student", "teacher", "stem", "weights", "width", "method", "temperature", "alpha", "beta")
CONDITIONS = ("lr", "weight_decay", "recipe_id", "dataset", "scale", "epochs_planned")  # in a name where arms would mix


@dataclass(frozen=True)
class Adapter:
    """How to read tables that no run of ours wrote. A trials table has to have `trial_id` and `seed`, an epochs table
    `trial_id`, `epoch` and `val_accuracy`; what else is there is used, and what is not is null.

    Made where they are missing: `run` (the files' name), `role` (from the phase), `epochs_planned` (the epochs that
    were run), `status` (completed, or stopped where fewer epochs ran than were planned), and `arm` (the levels in
    which students differ). Raises `ValueError` where two columns come to have one name.
    """

    columns: Mapping[str, str] = field(default_factory=dict)  # their name to ours
    phases: Mapping[str, str] = field(default_factory=dict)  # their phase to teacher, screen or confirm
    rest: str | None = None  # what every other phase of theirs is; null refuses it

    def apply(self, run: str, tables: "dict[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
        """The tables in our names, with what could be made."""
        named = {name: table.rename(columns=dict(self.columns)) for name, table in tables.items()}
        for name, table in named.items():
            if not table.columns.is_unique:
                twice = ", ".join(map(str, table.columns[table.columns.duplicated()]))
                raise ValueError(f"{name} has more than one column {twice}")
        trials = named["trials"]
        if "phase" not in trials:
            trials = trials.assign(phase="confirm")
        else:
            if unknown := sorted(set(self.phases) - set(trials["phase"])):
                there = ", ".join(map(repr, trials["phase"].dropna().unique()))
                raise ValueError(f"no trial has the phase {', '.join(map(repr, unknown))}; there are {there}")
            phases = trials["phase"].replace(dict(self.phases))
            if self.rest is not None:
                phases = phases.where(phases.isin(PHASES), self.rest)
            trials = trials.assign(phase=phases)
        if "role" not in trials:
            taught = trials["phase"].isin(["teacher"])
            trials = trials.assign(role=["teacher" if each else "student" for each in taught])
        if "run" not in trials:
            trials = trials.assign(run=run)
        if "epochs_planned" not in trials and "epochs_run" in trials:
            trials = trials.assign(epochs_planned=trials["epochs_run"])
        if "status" not in trials:
            trials = _with_status(trials)
        if "arm" not in trials:
            trials = trials.assign(arm=_arms(trials))
        epochs = named["epochs"]
        if "run" not in epochs:
            epochs = epochs.assign(run=run)
        return {**named, "trials": trials, "epochs": epochs}


def parse_phases(settings: Sequence[str]) -> dict[str, str]:
    """What `--phase THEIRS=OURS` says. Raises `UserError`."""
    problems, found = [], {}
    for setting in settings:
        theirs, sign, ours = setting.partition("=")
        if not theirs or not sign or ours not in PHASES:
            problems.append(f"--phase is {setting!r}; allowed: THEIRS=OURS, where OURS is {', '.join(PHASES)}")
        found[theirs] = ours
    if problems:
        raise UserError(*problems)
    return found


def _with_status(trials: "pd.DataFrame") -> "pd.DataFrame":
    """Completed, but for trials that ran fewer epochs than planned, which have no final accuracy."""
    if "epochs_run" not in trials:
        return trials.assign(status="completed")
    short = (trials["epochs_run"] < trials["epochs_planned"]).fillna(False).astype(bool)
    final = [name for name in ("test_accuracy", "test_accuracy_best") if name in trials]
    return trials.assign(
        status=["stopped" if each else "completed" for each in short],
        **{name: trials[name].mask(short) for name in final},
    )


def _arms(trials: "pd.DataFrame") -> list[str]:
    """The levels that apply to each trial, of the columns that are not alike in all students: `cifar/logit/T=4`."""
    import pandas as pd

    students = trials[trials["role"] == "student"]
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
